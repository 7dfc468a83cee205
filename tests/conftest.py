"""Fixtures that every test may use."""

from __future__ import annotations

import os

import pytest
import ranks as ranks_module
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose own functions ask for it when they are made
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def ranks():
    """`ranks(world_size, function, *args, timeout=60)`: see tests/ranks.py."""
    return ranks_module.ranks
