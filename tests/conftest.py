"""Fixtures that every test may use."""

from __future__ import annotations

import pytest
import ranks as ranks_module


@pytest.fixture
def ranks():
    """`ranks(world_size, function, *args, timeout=60)`: see tests/ranks.py."""
    return ranks_module.ranks
