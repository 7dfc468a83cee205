"""Calls that end: a function in a process of its own, with a limit on CPU time and memory that the kernel keeps.

A signal handler or a thread cannot end `9**9**9**9` or a regular expression that backtracks for ever: both stay inside
one C function. So the function runs in a child process, whose CPU timer the kernel lets expire by ending the process.
CPU time, not the clock's: a verdict does not depend on how busy the machine is. This bounds time and memory; it is no
sandbox.

    trainer: asks, (number, CPU seconds, arguments) as a pickle; takes the answer with that number, as JSON
    nursery: imports the function once, forks a server, says how it died and forks another (milliseconds, not an import)
    server:  answers

What comes back is never unpickled: some scorers evaluate what a policy wrote.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

MEMORY_BYTES = 4 * 2**30  # address space of the child
START_SECONDS = 300.0  # to import the function: libraries on a shared file system can take minutes
CLOCK_FACTOR, CLOCK_SECONDS = 4, 30.0  # clock limit of a call that sleeps: CPU seconds x 4 + 30
MAX_ERROR_CHARS = 200


class BoundedError(Exception):
    """A call that was ended, whose process died, or that raised; the message says which."""


class BoundedFunction:
    """`module:function`, called in a child process that is started at the first call."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # one request at a time, whichever thread asks
        self._asked = 0
        self._read = b""  # what the child has written and nobody has looked at
        atexit.register(self.close)

    def __call__(self, cpu_seconds: float, *arguments: Any) -> Any:
        """function(*arguments), which must be JSON's kind of value; the arguments are pickled.

        Raises BoundedError when it takes more than `cpu_seconds` of CPU time, raises, or dies.
        """
        with self._lock:
            process = self._process or self._start()
            self._asked += 1
            request = pickle.dumps((self._asked, cpu_seconds, arguments))
            with contextlib.suppress(BrokenPipeError):  # it has died: the answer says so
                assert process.stdin is not None
                process.stdin.write(len(request).to_bytes(8, "big") + request)
                process.stdin.flush()
            reply = self._reply(CLOCK_FACTOR * cpu_seconds + CLOCK_SECONDS)
        if "error" in reply:
            raise BoundedError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """End the child; the next call starts another."""
        process, self._process, self._read = self._process, None, b""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nursery and server: their session is their own
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # threads do not survive a fork
        self._process = subprocess.Popen(
            [sys.executable, "-m", "grpo_mega.rewards.bounded", self.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries warn there, once a process
            env={**os.environ, **threads, "PYTHONPATH": path},
            start_new_session=True,
        )
        ready = self._reply(START_SECONDS)
        if "error" in ready:
            self.close()
            raise BoundedError(ready["error"])
        return self._process

    def _reply(self, clock_seconds: float) -> dict[str, Any]:
        """The answer to the last question; if none comes that can be read, the child is ended and the reason given."""
        end = time.monotonic() + clock_seconds
        try:
            while True:
                reply = json.loads(self._line(end))
                if not isinstance(reply, dict) or not {"value", "error"} & set(reply):
                    raise ValueError
                # a server that died between two questions is told of (None) at the next, whose answer comes late
                if reply.get("number") in (None, self._asked):
                    return reply
        except TimeoutError:
            reason = f"TimeoutError: no answer within {clock_seconds:g} s by the clock"
        except EOFError:
            reason = f"ChildProcessError: the process of {self.target} has died"
        except ValueError:
            reason = f"ChildProcessError: the process of {self.target} wrote what is no answer"
        self.close()
        return {"error": reason}

    def _line(self, end: float) -> bytes:
        process = self._process
        assert process is not None and process.stdout is not None
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line


@cache
def bounded(target: str) -> BoundedFunction:
    """The one BoundedFunction of this process for `target`."""
    return BoundedFunction(target)


def describe(error: BaseException) -> str:
    """Type: message, on one line of at most MAX_ERROR_CHARS, whatever the exception's own __str__ does."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    kind = "" if isinstance(error, BoundedError) else f"{type(error).__name__}: "  # that message has its type in it
    return f"{kind}{' '.join(message[:MAX_ERROR_CHARS].split())}"[:MAX_ERROR_CHARS]


def nursery(target: str) -> None:
    """The child's life: import, then keep one server alive until the trainer closes its end."""
    requests, replies = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # what a function prints must not be taken for a reply
        os.dup2(null, standard)
    try:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        if prepare := getattr(importlib.import_module(module), "prepare", None):
            prepare()  # imports that a function leaves for its first call
    except BaseException as error:
        return _send(replies, json.dumps({"error": describe(error)}))
    _send(replies, json.dumps({"value": "ready"}))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        server = os.fork()
        if server == 0:
            try:
                _serve(function, requests, replies)
            finally:
                os._exit(0)  # the trainer is gone
        status = os.waitpid(server, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        _send(replies, json.dumps({"error": _death(status)}))


def _serve(function: Any, requests: BinaryIO, replies: BinaryIO) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while size := int.from_bytes(_exactly(requests, 8), "big"):
        request = _exactly(requests, size)
        number = None
        try:
            number, cpu_seconds, arguments = pickle.loads(request)
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            answer = json.dumps({"number": number, "value": function(*arguments)})
        except BaseException as error:
            answer = json.dumps({"number": number, "error": describe(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(replies, answer)


def _exactly(requests: BinaryIO, size: int) -> bytes:
    """`size` bytes; fewer when the trainer has closed its end."""
    found = b""
    while len(found) < size and (part := requests.read(size - len(found))):
        found += part
    return found


def _send(replies: BinaryIO, answer: str) -> None:
    left = memoryview(answer.encode() + b"\n")
    while left:
        left = left[replies.write(left) or 0 :]


def _death(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return "TimeoutError: no result within its time_limit of CPU time"
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    return f"ChildProcessError: the process died of {how}"


if __name__ == "__main__":
    nursery(sys.argv[1])
