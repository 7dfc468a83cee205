"""What the training loop asks of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grpo_mega.types import Completion, Prompt


class Sampler(Protocol):
    def sample(self, prompts: Sequence[Prompt], group_size: int, step: int) -> list[list[Completion]]:
        """`group_size` completions of each of this data-parallel rank's prompts, alike on every rank of a replica."""
        ...
