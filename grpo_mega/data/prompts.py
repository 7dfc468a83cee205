"""Prompts: rows as they are put to the policy, and the endless deterministic stream of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_mega.config import DataConfig
from grpo_mega.data.rows import Row, shuffled
from grpo_mega.data.tokenizer import ChatTokenizer
from grpo_mega.errors import CheckpointError, DataError
from grpo_mega.types import Prompt

Render = Callable[[Row, int], Prompt]


@dataclass(frozen=True, slots=True)
class Renderer:
    """Row -> Prompt: the instruction around the row's text, the chat template around that, and the length checked.

    Raises DataError for a prompt of p tokens when p + max_completion_tokens > context_length, or when p is 0.
    """

    config: DataConfig
    tokenizer: ChatTokenizer
    max_completion_tokens: int
    context_length: int

    def __call__(self, row: Row, index: int) -> Prompt:
        # replace, not format: instructions and prompts are full of braces (LaTeX, JSON)
        text = self.config.instruction.replace("{prompt}", row["prompt"])
        token_ids = self.tokenizer.prompt_ids(text, self.config.system)
        if not token_ids:
            raise DataError(f"{row['origin']}: {text!r} has no tokens to go on from; remove the row")
        left = self.context_length - len(token_ids)
        if left < self.max_completion_tokens:
            lower = f", or lower sampling.max_completion_tokens to {left}" if left > 0 else ""
            raise DataError(
                f"{row['origin']}: the prompt has {len(token_ids)} tokens, with sampling.max_completion_tokens="
                f"{self.max_completion_tokens} too many for a context of {self.context_length}; remove the row{lower}"
            )
        return Prompt(index=index, text=text, token_ids=token_ids, answer=row["answer"], row=row["fields"])


class PromptStream:
    """The endless stream of training prompts, the same on every rank: epoch e is a permutation decided by (seed, e).

    Every row is rendered, and so checked, at construction. `Prompt.index` is the position in the stream: prompt i is
    row permutation(seed, i // rows)[i % rows]. A count that does not divide the epoch runs on into the next one.
    """

    def __init__(self, rows: Sequence[Row], render: Render, *, seed: int) -> None:
        if not rows:
            raise DataError("there are no training rows; give at least one")
        self._prompts = [render(row, 0) for row in rows]
        self._seed, self._cursor = seed, 0
        self._epoch, self._order = -1, list[int]()

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts of the stream; a rank takes its share of them afterwards."""
        start, self._cursor = self._cursor, self._cursor + count
        return [self._at(index) for index in range(start, self._cursor)]

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self._prompts), "epoch", self._seed, epoch)
        return replace(self._prompts[self._order[place]], index=index)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the index of the next prompt, and what the stream was made of."""
        return {"cursor": self._cursor, "rows": len(self._prompts), "seed": self._seed}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError when it is damaged or of another stream."""
        cursor = state.get("cursor")
        if type(cursor) is not int or cursor < 0:
            raise CheckpointError(f"the checkpoint's prompt cursor is {cursor!r}, not a count; use another checkpoint")
        here = self.state()
        for key, source in (("rows", "the training rows"), ("seed", "run.seed")):
            if state.get(key) != here[key]:
                raise CheckpointError(
                    f"the checkpoint's prompt stream has {key}={state.get(key)}, this run's has {key}={here[key]}, so "
                    f"prompts would repeat or go missing; resume with {source} it was saved with"
                )
        self._cursor = cursor


def heldout_prompts(rows: Sequence[Row], render: Render) -> list[Prompt]:
    """The held-out rows as prompts with index -1, -2, ...: no training prompt draws the same sampling noise."""
    return [render(row, -1 - i) for i, row in enumerate(rows)]
