"""The `format` reward: 1.0 if a completion consists of the tagged blocks asked for, as DeepSeek-R1 (arXiv:2501.12948)
rewards <think>...</think><answer>...</answer>."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grpo_mega.config.reward import FormatOptions


def tagged(options: FormatOptions) -> Callable[[str, str | None, Mapping[str, Any]], float]:
    """The reward function: 1.0 if the text is, but for space around the blocks, <a>...</a><b>...</b> for the tags a, b
    in their order, each of these tags there once, each block with something in it; else 0.0.

    With `options.opened` the first opening tag is the prompt's, and the completion must not repeat it. Tags are
    compared letter by letter. Linear in the text.
    """
    marks = [mark for tag in options.tags for mark in (f"<{tag}>", f"</{tag}>")]

    def score(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
        text = marks[0] + completion if options.opened else completion
        if any(text.count(mark) != 1 for mark in marks):
            return 0.0
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:  # it stood further ahead: out of order
                return 0.0
            pieces.append(before)
        outside, inside = [*pieces[0::2], text], pieces[1::2]
        return float(not any(piece.strip() for piece in outside) and all(piece.strip() for piece in inside))

    return score
