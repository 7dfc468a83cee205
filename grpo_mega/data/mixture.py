"""The endless stream of training prompts: whose turn it is among the sources, and each source's order, by arithmetic.

Nothing here is drawn at random while a run goes on: the same on every rank, platform and resumed run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from grpo_mega.errors import CheckpointError, DataError
from grpo_mega.types import Prompt


def shuffled(count: int, *key: str | int) -> list[int]:
    """A permutation of range(count) that `key` decides, the same on every platform and Python version.

    It sorts by uniform numbers because `random.Random(str).random()` is documented to be reproducible and
    `random.shuffle` is not.
    """
    rng = random.Random("/".join(map(str, key)))
    keys = [rng.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


class Schedule:
    """Which source the next prompt comes from, so that proportions hold over every stretch, not just on average.

    After any n prompts, source k of share s_k (weight over the sum of weights) has given more than s_k * n - 1 of them
    and less than s_k * n + 1. Its j-th prompt (from 0) may come at n >= floor(j / s_k) and is due before
    ceil((j + 1) / s_k); of those that may come, the one due first is taken, the lower index in a tie. (Earliest
    deadline first meets every deadline of unit jobs that can be met, and these windows can: Baruah, Cohen, Plaxton and
    Varvel, "Proportionate progress", Algorithmica 15, 1996.) Weights are taken as the decimals they are written as, so
    all of it is integer arithmetic, periodic in the sum of the smallest integer weights.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        integers = [int(weight * scale) for weight in exact]
        divisor = math.gcd(*integers)
        self._weights = [weight // divisor for weight in integers]
        self._total = sum(self._weights)
        self.seek(0)

    def seek(self, taken: int) -> None:
        """Stand where `taken` prompts have been given."""
        periods, rest = divmod(taken, self._total)
        self.taken = taken - rest
        self.counts = [weight * periods for weight in self._weights]
        for _ in range(rest):
            self.next()

    def next(self) -> int:
        """The index of the source that the next prompt comes from."""
        self.taken += 1
        due = [
            (-(-(count + 1) * self._total // weight), k)
            for k, (weight, count) in enumerate(zip(self._weights, self.counts, strict=True))
            if count * self._total < weight * self.taken
        ]
        _, k = min(due)
        self.counts[k] += 1
        return k


class PromptStream:
    """The endless stream of training prompts, the same on every rank.

    Sources take turns by `Schedule`. Prompt i of one source is its row permutation(seed, epoch)[place] with epoch,
    place = divmod(i, rows): each source runs through epochs of its own, and a count that does not divide one runs on
    into the next. With several sources the permutation depends on the source's index, too.
    `Prompt.index` is the position in the whole stream.
    """

    def __init__(
        self, sources: Sequence[Sequence[Prompt]], *, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        if not sources or not all(sources):
            raise DataError("there are no training rows; give at least one for each source")
        self._weights = [1.0] * len(sources) if weights is None else list(weights)
        self._schedule, self._seed = Schedule(self._weights), seed
        keys: list[tuple[str | int, ...]] = [("epoch", seed)]
        if len(sources) > 1:
            keys = [("epoch", seed, "source", k) for k in range(len(sources))]
        self._sources = [_Epochs(prompts, key) for prompts, key in zip(sources, keys, strict=True)]

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts of the stream; a rank takes its share of them afterwards."""
        prompts = []
        for _ in range(count):
            index = self._schedule.taken
            k = self._schedule.next()
            prompts.append(replace(self._sources[k].at(self._schedule.counts[k] - 1), index=index))
        return prompts

    def everything(self) -> list[Prompt]:
        """Every prompt once, source by source."""
        return [prompt for source in self._sources for prompt in source.prompts]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the index of the next prompt, and what the stream was made of."""
        rows = [len(source.prompts) for source in self._sources]
        made_of: dict[str, Any] = {"rows": rows[0]} if len(rows) == 1 else {"rows": rows, "weights": self._weights}
        return {"cursor": self._schedule.taken, **made_of, "seed": self._seed}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError when it is damaged or of another stream."""
        cursor = state.get("cursor")
        if type(cursor) is not int or cursor < 0:
            raise CheckpointError(f"the checkpoint's prompt cursor is {cursor!r}, not a count; use another checkpoint")
        here = self.state()
        for key, what in (("rows", "the training rows"), ("weights", "the sources' weights"), ("seed", "run.seed")):
            if state.get(key) != here.get(key):
                raise CheckpointError(
                    f"the checkpoint's prompt stream has {key}={state.get(key)}, this run's has {key}={here.get(key)}, "
                    f"so prompts would repeat or go missing; resume with {what} it was saved with"
                )
        self._schedule.seek(cursor)


class _Epochs:
    """One source's prompts, epoch after epoch."""

    def __init__(self, prompts: Sequence[Prompt], key: tuple[str | int, ...]) -> None:
        self.prompts, self._key = prompts, key
        self._epoch, self._order = -1, list[int]()

    def at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(len(self.prompts), *self._key, epoch)
        return self.prompts[self._order[place]]
