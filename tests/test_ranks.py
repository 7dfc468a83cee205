"""The helper that starts ranks: results by rank, and failures that say which rank, why and where the others are."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import ranks as pool
import torch
import torch.distributed as dist
from ranks import RankError


@dataclass
class Answer:
    rank: int
    total: torch.Tensor
    seeded: float


def sum_of_ranks(scale):
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1) * scale])
    dist.all_reduce(total)
    return Answer(dist.get_rank(), total, torch.rand(()).item())


def leave_state():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    found = (dist.is_initialized(), parallel_state.is_initialized(), "LEFT" in os.environ, torch.get_default_dtype())
    threads = torch.get_num_threads()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(dist.get_world_size())
    random.initialize_rng_tracker()
    os.environ["LEFT"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    torch.set_num_threads(1)
    return found, threads, int(os.environ["WORLD_SIZE"])


def fail_on(rank):
    print(f"rank {os.environ['RANK']} was here")
    if int(os.environ["RANK"]) == rank:
        raise ArithmeticError("six times nine")


def fail_while_the_other_waits():
    if os.environ["RANK"] == "1":
        raise ArithmeticError("six times nine")
    wait_for_ever()


def wait_for_ever():
    time.sleep(600)


def wait_on_rank_1():
    if os.environ["RANK"] == "1":
        wait_for_ever()


def die(how):
    if os.environ["RANK"] == "1":
        if how == "exit":
            os._exit(17)
        os.kill(os.getpid(), signal.SIGKILL)


def process_id():
    return os.getpid()


def unpicklable():
    return lambda: None


@pytest.fixture(scope="module")
def own_pool():
    """Workers of these tests' own, since they are killed; without megatron-core they start in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_pool", [])
        patch.setattr(pool, "PRELOADED", ())
        yield pool.ranks
        pool.close()


@pytest.mark.parametrize("world_size", [3, 1, 2])
def test_results_come_by_rank(ranks, world_size):
    answers = ranks(world_size, sum_of_ranks, 10.0)
    assert [answer.rank for answer in answers] == list(range(world_size))
    assert {answer.total.item() for answer in answers} == {10.0 * world_size * (world_size + 1) / 2}
    torch.manual_seed(0)
    assert {answer.seeded for answer in answers} == {torch.rand(()).item()}


def test_every_call_starts_clean_on_the_same_processes(ranks):
    first = ranks(2, process_id)
    cores = len(os.sched_getaffinity(0))
    for world_size in (2, 1, 2):
        clean = ((False, False, False, torch.float32), max(1, cores // world_size), world_size)
        assert ranks(world_size, leave_state) == [clean] * world_size
    assert ranks(2, process_id) == first


def test_an_exception_names_its_rank_and_keeps_its_type(ranks):
    before = ranks(2, process_id)
    with pytest.raises(RankError, match=r"rank 1 of 2 failed in .*fail_on: ArithmeticError: six times nine") as caught:
        ranks(2, fail_on, 1)
    message = str(caught.value)
    assert caught.value.rank == 1 and isinstance(caught.value.__cause__, ArithmeticError)
    assert 'raise ArithmeticError("six times nine")' in message and "rank 0 was here" in message
    assert ranks(2, process_id) == before  # both had answered: no worker is lost


def test_a_result_that_cannot_be_pickled_is_an_error(ranks):
    with pytest.raises(RankError, match=r"rank 0 of 1 failed.*pickle"):
        ranks(1, unpicklable)


def test_a_function_that_workers_cannot_import_is_refused(ranks):
    with pytest.raises(ValueError, match="module level"):
        ranks(1, lambda: None)


def test_timeout_shows_where_every_rank_is(own_pool, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)  # by which timeouts are longer
    before = own_pool(2, process_id)
    with pytest.raises(RankError, match=r"no answer from rank 1 of 2 in .*wait_on_rank_1 after 1\.\d s") as caught:
        own_pool(2, wait_on_rank_1, timeout=1)
    stacks = str(caught.value).split("---- rank ")[1:]
    assert caught.value.rank is None and [text[0] for text in stacks[:2]] == ["0", "1"]
    assert "in _serve" in stacks[0] and "in wait_for_ever" not in stacks[0]
    assert "in wait_for_ever" in stacks[1] and "in wait_on_rank_1" in stacks[1]
    after = own_pool(2, process_id)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_failure_does_not_wait_for_ranks_that_hang(own_pool, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.5)
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 failed") as caught:
        own_pool(2, fail_while_the_other_waits, timeout=60)
    assert "no answer from rank 0" in str(caught.value) and "in wait_for_ever" in str(caught.value)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("how", "words"), [("exit", "exit code 17"), ("kill", r"exit code -9 \(SIGKILL\)")])
def test_a_dead_worker_is_reported_and_replaced(own_pool, how, words):
    before = own_pool(2, process_id)
    with pytest.raises(RankError, match=f"rank 1 of 2 failed in .*die: its process ended with {words}"):
        own_pool(2, die, how)
    after = own_pool(2, process_id)
    assert after[0] == before[0] and after[1] != before[1]
    assert [answer.total.item() for answer in own_pool(2, sum_of_ranks, 1.0)] == [3.0, 3.0]


def test_an_idle_worker_that_was_killed_is_replaced(own_pool):
    before = own_pool(2, process_id)
    os.kill(before[0], signal.SIGKILL)
    while pool._pool[0].process.poll() is None:
        time.sleep(0.01)
    after = own_pool(2, process_id)
    assert after[0] != before[0] and after[1] == before[1]


def test_closing_ends_the_workers_and_the_next_call_starts_new_ones(own_pool):
    before = own_pool(1, process_id)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(before[0], 0)
    assert own_pool(1, process_id) != before
