"""What every section of a recipe shares: strictness, and the types of its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Counts = Annotated[tuple[NonNegative, ...], Field(strict=False)]  # YAML has lists, no tuples


class Section(BaseModel):
    # strict: `save_every: true` is not 1, and `num_steps: "10"` is not 10
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one nearest to it, or all of them."""
    known = list(known)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"
