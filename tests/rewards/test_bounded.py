"""Limits that hold where no handler could interrupt; `builtins:eval` runs what a test says in the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo_mega.rewards import bounded as module
from grpo_mega.rewards.bounded import BoundedError, BoundedFunction


@pytest.fixture(scope="module")
def evaluate():
    function = BoundedFunction("builtins:eval")
    yield function
    function.close()


def test_values_and_texts_go_there_and_back(evaluate):
    assert evaluate(5.0, "6 * 7") == 42
    assert evaluate(5.0, "[None, 0.5, 'ä\\ud800', {'a': True}]") == [None, 0.5, "ä\ud800", {"a": True}]
    assert evaluate(5.0, "len(text)", {"text": "x" * 3_000_000}) == 3_000_000
    assert evaluate(5.0, "'y' * 3_000_000") == "y" * 3_000_000
    assert evaluate(5.0, "print('not a reply') or 5") == 5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("__import__('sys').exit(2)", "SystemExit: 2"),
        ("object()", "TypeError: Object of type object is not JSON serializable"),
        ("'x' * 10**10", "MemoryError: "),
        ("__import__('os')._exit(3)", "ChildProcessError: the process died of exit status 3"),
        ("__import__('os').abort()", "ChildProcessError: the process died of signal 6"),
        ("__import__('os').killpg(0, 9)", "ChildProcessError: the process of builtins:eval has"),
        ("__import__('os').write(4, b'{}\\n') or 1/0", "ChildProcessError: the process of builtins:eval wrote what is"),
    ],
)
def test_a_fault_is_told_and_the_next_call_works(evaluate, code, message):
    with pytest.raises(BoundedError) as caught:
        evaluate(5.0, code)
    assert str(caught.value).startswith(message)
    assert evaluate(5.0, "1 + 1") == 2


@pytest.mark.parametrize(
    "code", ["9**9**9**9", "__import__('re').match('(a+)+b', 'a' * 60)", "[0 for _ in iter(int, 1)]"]
)
def test_what_never_ends_is_ended(evaluate, code):
    start = time.monotonic()
    with pytest.raises(BoundedError, match=r"^TimeoutError: no result within its time_limit of CPU time$"):
        evaluate(0.2, code)
    assert time.monotonic() - start < 15  # takes 0.2 s on an idle core
    assert evaluate(5.0, "1 + 1") == 2


def test_cpu_time_is_what_counts(evaluate):
    assert evaluate(0.2, "__import__('time').sleep(0.6) or 7") == 7


def test_a_call_that_sleeps_for_ever_ends_by_the_clock(evaluate, monkeypatch):
    monkeypatch.setattr(module, "CLOCK_SECONDS", 0.2)
    with pytest.raises(BoundedError, match=r"^TimeoutError: no answer within 0\.6 s by the clock$"):
        evaluate(0.1, "__import__('time').sleep(1000)")
    monkeypatch.undo()
    assert evaluate(5.0, "1 + 1") == 2


def test_a_server_that_dies_between_two_calls_costs_one_and_shifts_none(evaluate):
    os.kill(evaluate(5.0, "__import__('os').getpid()"), signal.SIGKILL)
    with pytest.raises(BoundedError, match="died of signal 9"):
        evaluate(5.0, "'late'")
    assert [evaluate(5.0, str(n)) for n in range(3)] == [0, 1, 2]


def test_any_thread_may_call(evaluate):
    results = {}

    def ask(n):
        results[n] = [evaluate(5.0, f"{n} + {i}") for i in range(20)]

    threads = [threading.Thread(target=ask, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {100 * n: [100 * n + i for i in range(20)] for n in range(4)}


def test_a_function_that_is_not_there():
    with pytest.raises(BoundedError, match=r"^ModuleNotFoundError: No module named 'no_such_library'$"):
        BoundedFunction("no_such_library:f")(1.0)


def test_no_process_outlives_the_trainer():
    """Not one that is computing either: it has its CPU limit."""
    code = (
        "import os, threading, time; from grpo_mega.rewards.bounded import BoundedFunction\n"
        "f = BoundedFunction('builtins:eval')\n"
        "print(f(5.0, \"[__import__('os').getpid(), __import__('os').getppid()]\"), flush=True)\n"
        "threading.Thread(target=f, args=(0.5, '9**9**9**9'), daemon=True).start(); time.sleep(0.2); os._exit(1)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(module.__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    pids, end = eval(done.stdout), time.monotonic() + 30
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
