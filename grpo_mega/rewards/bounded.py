"""Calls that end: a function in a process of its own, with a limit on CPU time and memory that the kernel keeps.

A signal handler or a thread cannot end `9**9**9**9` or a regular expression that backtracks for ever: both stay inside
one C function. So the function runs in a child process, whose CPU timer the kernel lets expire by ending the process.
CPU time, not the clock's: a verdict does not depend on how busy the machine is. This bounds time and memory; it is no
sandbox.

    trainer --pickle--> nursery: imports the function once, then forks ...
    trainer <--JSON---- server:  ... a server, and another when that one has died

What comes back is JSON and is never unpickled: some scorers evaluate what a policy wrote.
"""

from __future__ import annotations

import atexit
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
MAX_MESSAGE = 2000


class BoundedError(Exception):
    """A call that was ended, whose process died, or that raised; the message says which."""


class BoundedFunction:
    """`module:function`, called in a child process that is started at the first call."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # one request at a time, whichever thread asks

    def __call__(self, cpu_seconds: float, *arguments: Any) -> Any:
        """function(*arguments), which must be JSON's kind of value; the arguments are pickled.

        Raises BoundedError when it takes more than `cpu_seconds` of CPU time, raises, or dies.
        """
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(pickle.dumps((cpu_seconds, arguments)))
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it died between two calls; the answer below says so
            reply = self._reply(CLOCK_FACTOR * cpu_seconds + CLOCK_SECONDS)
        if "error" in reply:
            raise BoundedError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """End the child; the next call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)  # nursery and server: its session is its own
        except ProcessLookupError:
            pass
        for stream in (process.stdin, process.stdout):
            try:
                assert stream is not None
                stream.close()
            except BrokenPipeError:
                pass
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
        atexit.register(self.close)
        ready = self._reply(START_SECONDS)
        if "error" in ready:
            self.close()
            raise BoundedError(ready["error"])
        return self._process

    def _reply(self, clock_seconds: float) -> dict[str, Any]:
        """The child's next line; on anything but a proper one the child is ended."""
        process, line, end = self._process, b"", time.monotonic() + clock_seconds
        assert process is not None and process.stdout is not None
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.close()
                return {"error": f"TimeoutError: no result within {clock_seconds:g} s by the clock"}
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                self.close()
                return {"error": f"ChildProcessError: the process of {self.target} has died"}
            line += part
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or not ({"value", "error"} & set(reply)):
            self.close()
            return {"error": f"ChildProcessError: the process of {self.target} wrote what is no result"}
        return reply


@cache
def bounded(target: str) -> BoundedFunction:
    """The one BoundedFunction of this process for `target`."""
    return BoundedFunction(target)


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
        return _send(replies, {"error": _described(error)})
    _send(replies, {"value": "ready"})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while True:
        server = os.fork()
        if server == 0:
            _serve(function, requests, replies)
            os._exit(0)
        status = os.waitpid(server, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return  # nothing is left to ask
        _send(replies, {"error": _death(status)})


def _serve(function: Any, requests: BinaryIO, replies: BinaryIO) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while True:
        try:
            cpu_seconds, arguments = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            reply = {"value": function(*arguments)}
        except BaseException as error:
            reply = {"error": _described(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(replies, reply)


def _send(replies: BinaryIO, reply: dict[str, Any]) -> None:
    left = memoryview(json.dumps(reply).encode() + b"\n")
    while left:
        left = left[replies.write(left) :]


def _described(error: BaseException) -> str:
    try:
        message = " ".join(str(error)[:MAX_MESSAGE].split())
    except Exception:
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {message}"


def _death(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return "TimeoutError: no result within its time_limit of CPU time"
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    return f"ChildProcessError: the process died of {how}"


if __name__ == "__main__":
    nursery(sys.argv[1])
