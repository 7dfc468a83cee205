"""Runs a function on several ranks: the one way in which tests start processes.

    def body(x): ...                             # at module level: the workers import it by name
    results = ranks(2, body, x, timeout=60)      # [result of rank 0, result of rank 1]

The workers are started once a session, as many as were asked for so far, and import torch and megatron-core once. For
each call they have torchrun's environment variables with a fresh port, their share of the cores and seeded generators;
when every rank has answered, megatron's and torch.distributed's global state is forgotten. The function makes its own
process group (grpo_mega.parallel.mesh.initialize), so that the backend stays the business of grpo_mega.parallel.

Arguments and results are pickled; tensors are copied. What a worker prints goes to a file and is shown on a failure.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_S = 120.0  # for a worker to import torch and megatron-core
FORGET_S = 10.0  # for a worker to forget its last call
GRACE_S = 10.0  # for the other ranks to answer once one has failed
DUMP_S = 2.0  # for a worker to write its stacks
TAIL = 4000  # characters of a rank's output that an error shows
PRELOADED = ("torch.distributed", "megatron.core.parallel_state", "megatron.core.tensor_parallel")
TESTS = Path(__file__).resolve().parent


class RankError(RuntimeError):
    """A call failed on some rank; the message holds that rank's traceback, and the stacks of ranks that hang.

    rank: the first that failed, None when none did but some did not answer in time. `__cause__` is that rank's own
    exception where pickle can carry it.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


def ranks(world_size: int, function: Callable, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return what it returned, by rank.

    Raises RankError when the function raises on a rank, when a worker dies, or when a rank has not answered after
    `timeout` seconds or 10 s after another one failed; in the last two cases with the Python stacks of all ranks. A
    worker that died or hangs is replaced by the next call.
    """
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} cannot be imported by a worker; define it at module level")
    workers, environments = _workers(world_size), _environments(world_size)
    request = {
        "module": function.__module__,
        "file": sys.modules[function.__module__].__file__,
        "function": function.__qualname__,
        "args": pickle.dumps(args),  # bytes: they may name classes of that module, which is loaded first
        "path": sys.path,
    }
    patience = timeout * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # who has a part of the cores is slower
    call = _Call(f"{function.__module__}.{function.__qualname__}", dict(enumerate(workers)), patience)
    try:
        for worker, environment in zip(workers, environments, strict=True):
            worker.start({**request, "environment": environment})
        return call.collect()
    finally:
        for rank, worker in enumerate(workers):
            if rank in call.pending:  # it hangs, or the parent was interrupted
                worker.kill()
            else:
                worker.release()


def close() -> None:
    """End all workers; the next call starts new ones."""
    while _pool:
        _pool.pop().kill()


# ---- the parent's side

_pool: list[_Worker] = []
atexit.register(close)


@functools.cache
def _files() -> tempfile.TemporaryDirectory:
    """Where the logs are, removed at the end; made by the parent alone, for workers run this file too."""
    return tempfile.TemporaryDirectory(prefix="ranks-")


class _Worker:
    """One process, and the parent's end of its socket."""

    def __init__(self, rank: int) -> None:
        self.rank, self.is_ready, self.is_alive = rank, False, True
        folder = Path(tempfile.mkdtemp(dir=_files().name))
        self.log, self.stacks, self.log_start = folder / "log", folder / "stacks", 0
        ours, theirs = socket.socketpair()
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(self.stacks), *PRELOADED],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then kills it
            )
        self.connection = Connection(ours.detach())

    def ready(self, limit: float) -> bool:
        """Whether it can take a call, now or within `limit` seconds."""
        if self.is_alive and not self.is_ready:
            with contextlib.suppress(EOFError, OSError):
                self.is_ready = self.connection.poll(limit) and self.connection.recv_bytes() == b"ready"
        return self.is_alive and self.is_ready and self.process.poll() is None

    def start(self, request: dict[str, Any]) -> None:
        self.is_ready, self.log_start = False, self.log.stat().st_size
        with contextlib.suppress(OSError):  # it has just died: `collect` finds out and reports it
            self.connection.send_bytes(pickle.dumps(request))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b"release")

    def dump(self) -> str:
        """The Python stacks of its threads, whatever they are blocked in."""
        if self.process.poll() is not None:
            return f"exited with code {self.process.returncode}"
        before = self.stacks.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + DUMP_S
        while self.stacks.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)  # for the rest of it
        return self.stacks.read_text()[before:].strip() or "does not answer a signal"

    def output(self) -> str:
        """The end of what it has printed since the call began."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace").strip()[-TAIL:]

    def kill(self) -> None:
        """End it and what it started."""
        if self.is_alive:
            self.is_alive = False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.connection.close()


class _Call:
    """The answers to one call."""

    def __init__(self, name: str, workers: dict[int, _Worker], timeout: float) -> None:
        self.name, self.workers, self.timeout = name, workers, timeout
        self.pending = dict(workers)
        self.results: dict[int, Any] = {}
        self.errors: dict[int, str] = {}  # in the order in which they came: the first is likely the cause
        self.cause: BaseException | None = None

    def collect(self) -> list[Any]:
        """Wait for every rank; the results by rank, or RankError."""
        started = time.monotonic()
        deadline = started + self.timeout
        while self.pending:
            rank_of = {worker.connection: rank for rank, worker in self.pending.items()}
            answered = wait(list(rank_of), max(0.0, deadline - time.monotonic()))
            if not answered:
                raise self._error(time.monotonic() - started) from self.cause
            for connection in answered:
                self._receive(rank_of[connection])
            if self.errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if self.errors:
            raise self._error(0.0) from self.cause
        return [self.results[rank] for rank in self.workers]

    def _receive(self, rank: int) -> None:
        worker = self.pending.pop(rank)
        try:
            answer = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            worker.kill()
            code = worker.process.returncode
            signalled = f" ({signal.Signals(-code).name})" if code < 0 else ""
            self.errors[rank] = f"its process ended with exit code {code}{signalled}"
            return
        if "result" in answer:
            self.results[rank] = pickle.loads(answer["result"])
            return
        if not self.errors and answer["exception"]:
            with contextlib.suppress(Exception):  # its constructor may want other arguments than pickle gives
                self.cause = pickle.loads(answer["exception"])
        self.errors[rank] = answer["traceback"]

    def _error(self, waited: float) -> RankError:
        """What is known. Stacks are dumped while the workers still hang."""
        first = next(iter(self.errors), None)
        silent = ", ".join(map(str, self.pending))
        lines = []
        if first is not None:
            reason = self.errors[first].strip().splitlines()[-1]
            lines.append(f"rank {first} of {len(self.workers)} failed in {self.name}: {reason}")
        if silent:
            lines.append(f"no answer from rank {silent} of {len(self.workers)} in {self.name} after {waited:.1f} s")
        lines += [f"\n---- rank {rank} failed:\n{text.strip()}" for rank, text in self.errors.items()]
        if silent:
            lines += [f"\n---- rank {rank}, stacks:\n{worker.dump()}" for rank, worker in self.workers.items()]
        outputs = {rank: worker.output() for rank, worker in self.workers.items()}
        lines += [f"\n---- rank {rank} printed:\n{text}" for rank, text in outputs.items() if text]
        return RankError("\n".join(lines), first)


def _workers(count: int) -> list[_Worker]:
    """The first `count` workers, ready."""
    for rank in range(count):
        if rank == len(_pool):
            _pool.append(_Worker(rank))
    deadline = time.monotonic() + FORGET_S
    for rank in range(count):
        worker = _pool[rank]
        new = not worker.is_ready and worker.log_start == 0
        limit = START_S if new else max(0.0, deadline - time.monotonic())
        if not worker.ready(limit):
            worker.kill()
            _pool[rank] = _Worker(rank)
    for worker in _pool[:count]:
        if not worker.ready(START_S):
            raise RankError(f"the worker of rank {worker.rank} does not start:\n{worker.output()}", worker.rank)
    return _pool[:count]


@functools.cache
def _ports() -> Iterator[int]:
    """Free ports below those that the kernel gives away, a stretch of them for each of pytest-xdist's workers.

    A port that was free a moment ago is another process' by the time a rank listens on it, if both may draw it: ranks
    of two calls then meet in one store.
    """
    first = 12_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20_000
    offset = os.getpid() % 4_000  # another session on this machine
    return (first + (offset + n) % 5_000 for n in itertools.count())


def _environments(world_size: int) -> list[dict[str, str]]:
    for port in _ports():
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            break
    same = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {**same, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(world_size)]


# ---- the workers' side


def _serve(connection: Connection) -> None:
    """Answer calls until the parent closes its end."""
    while True:
        connection.send_bytes(b"ready")
        request = pickle.loads(connection.recv_bytes())
        environment = dict(os.environ)
        os.environ.update(request["environment"])
        connection.send_bytes(pickle.dumps(_answer(request)))
        connection.recv_bytes()  # released: no rank needs this one's store or connections any more
        _forget()
        os.environ.clear()
        os.environ.update(environment)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        _fresh(int(request["environment"]["LOCAL_WORLD_SIZE"]))
        function: Any = _module(request)
        for name in request["function"].split("."):
            function = getattr(function, name)
        return {"result": pickle.dumps(function(*pickle.loads(request["args"])))}
    except BaseException as error:
        exception = None
        with contextlib.suppress(Exception):
            exception = pickle.dumps(error)
        return {"traceback": traceback.format_exc(), "exception": exception}


def _module(request: dict[str, Any]) -> Any:
    """The function's module under the parent's name for it, which pickled classes carry too."""
    sys.path[:] = request["path"]
    name, file = request["module"], request["file"]
    if name in sys.modules or TESTS not in Path(file).parents:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _fresh(local_ranks: int) -> None:
    """The same state before every call, whatever the last one did."""
    import random

    import numpy as np
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _forget() -> None:
    """Undo what a call leaves in globals: process groups, megatron's groups, random states and microbatch counter."""
    import torch.distributed as dist

    if "megatron.core" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state
        from megatron.core.tensor_parallel import random

        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.unset_num_microbatches_calculator()
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _main() -> None:
    import ctypes
    import faulthandler

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives a parent that was killed
    connection = Connection(int(sys.argv[1]))
    stacks = open(sys.argv[2], "w")  # noqa: SIM115 (open for life: faulthandler writes to it)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name in sys.argv[3:]:
        importlib.import_module(name)
    gc.freeze()  # what is imported for life needs no look after every call (0.3 s)
    with contextlib.suppress(EOFError, ConnectionResetError):  # the parent has gone
        _serve(connection)


if __name__ == "__main__":  # megatron's checkpoint writer spawns a process that imports this file again
    _main()
