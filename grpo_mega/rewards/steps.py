"""Where a completion's reasoning steps end: marks in its text -> tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from grpo_mega.types import Completion


@dataclass(frozen=True, slots=True)
class Marks:
    """A step ends with `delimiter`, where the text goes on behind it, or after `every` tokens; the last one ends with
    the completion.

    decode: token ids -> text, as `Completion.text` was made. Exactly one of the others is given.
    """

    decode: Callable[[Sequence[int]], str]
    delimiter: str | None = None
    every: int | None = None


def steps_of(completion: Completion, marks: Marks) -> tuple[list[str], list[int]]:
    """The texts of the steps, which add up to the completion's, and the index of the last token of each, ascending.

    A step's last token is the first with which the decoded text holds the whole mark; one token that holds two marks
    ends one step. Several marks in a row, and blank text between them, end one step. A completion without a mark is one
    step. The last step's last token is the completion's last (its stop token, if it was sampled).
    """
    text, ids = completion.text, completion.token_ids
    if marks.every is not None:
        ends = [*range(marks.every - 1, len(ids) - 1, marks.every), len(ids) - 1]
        places = [0, *(len(marks.decode(ids[: end + 1])) for end in ends[:-1]), len(text)]
        return [text[a:b] for a, b in pairwise(places)], ends
    assert marks.delimiter is not None
    mark = re.escape(marks.delimiter)
    found = re.finditer(f"{mark}(?:\\s*{mark})*", text)
    cuts = [match.end() for match in found if text[: match.start()].strip() and text[match.end() :].strip()]
    texts, ends, begin = list[str](), list[int](), 0
    for cut in cuts:
        end = _token_at(text[:cut], ids, marks)
        if end < len(ids) - 1 and (not ends or end > ends[-1]):
            texts.append(text[begin:cut])
            ends.append(end)
            begin = cut
    return [*texts, text[begin:]], [*ends, len(ids) - 1]


def _token_at(head: str, ids: Sequence[int], marks: Marks) -> int:
    """The index of the token that completes `head`, a beginning of the text."""
    low, high = 0, len(ids) - 1  # how many characters a longer prefix has hardly ever falls: search, then look closely
    while low < high:
        middle = (low + high) // 2
        if len(marks.decode(ids[: middle + 1])) >= len(head):
            high = middle
        else:
            low = middle + 1
    low = max(0, low - 3)  # an unfinished character can show as up to three
    while low < len(ids) - 1 and not marks.decode(ids[: low + 1]).startswith(head):
        low += 1
    return low
