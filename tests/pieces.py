"""Where the sentencepiece models are that tests read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}  # 32000 and 32768 pieces


def path_of(version: str) -> Path:
    path = Path(sys.prefix, "sentencepiece", "mistral_common", "data", FILES[version])
    if not path.exists():
        pytest.skip(f"{path} is not there: launch/setup.sh puts it there, which tests/run.sh calls")
    return path
