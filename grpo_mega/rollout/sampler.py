"""What the training loop asks of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grpo_mega.types import Completion, Prompt


class Sampler(Protocol):
    def sample(
        self, prompts: Sequence[Prompt], mine: Sequence[int], group_size: int, step: int
    ) -> list[list[Completion]]:
        """`group_size` completions of each of prompts[i], i in `mine`, alike on every rank of a training replica.

        prompts: the step's, alike on all ranks. Which rank samples which of them is the sampler's business.
        """
        ...
