"""A model to convert, and a copy of it to be spoilt."""

from __future__ import annotations

import shutil

import pytest
from families import make_family


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")
