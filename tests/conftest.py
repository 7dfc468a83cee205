"""Fixtures that every test may use; and under pytest-xdist a share of the cores for each of its workers.

Processes that share cores wait for each other inside every product (six steps of a tiny model on a busy machine: 19.2 s
with two threads, 2.7 s with one). Each worker and whatever ranks it starts therefore stay on cores of their own.
"""

from __future__ import annotations

import os

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and len(os.sched_getaffinity(0)) > 1:  # before torch counts cores
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[int(worker.removeprefix("gw")) % count :: count]) or set(cores))

import pytest
import ranks as ranks_module
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose own functions ask for it when they are made
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def ranks():
    """`ranks(world_size, function, *args, timeout=60)`: see tests/ranks.py."""
    return ranks_module.ranks
