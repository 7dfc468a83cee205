"""Completions that nobody samples: the data rows' own, in a sampler's place (sampling.source=data)."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.types import Completion, Prompt


class Demonstrations:
    """A `Sampler` of one completion a prompt, which is what its row demonstrates."""

    def sample(
        self, prompts: Sequence[Prompt], mine: Sequence[int], group_size: int, step: int
    ) -> list[list[Completion]]:
        """Of each of prompts[i], i in `mine`, its demonstration. Raises ValueError where there is none, or one is not
        what was asked for."""
        if group_size != 1:
            raise ValueError(f"a row has one demonstration, and {group_size} completions of each prompt were asked for")
        return [[_of(prompts[i])] for i in mine]


def _of(prompt: Prompt) -> Completion:
    if prompt.demonstration is None:
        raise ValueError(f"prompt {prompt.index} has no demonstration; render it with the policy's stop tokens")
    return prompt.demonstration
