"""Two checkpoints, tensor by tensor under Hugging Face's names, whatever their formats and layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grpo_mega.convert.source import Source
from grpo_mega.model.names import shapes

CHUNK = 1 << 24  # numbers that are compared at a time


@dataclass(frozen=True)
class Row:
    """A tensor: `same` means every bit; else the differences of its numbers in float64, `relative` being
    |a - b| / |a| in Frobenius norm, or what keeps them from being compared."""

    name: str
    same: bool
    problem: str = ""
    max_difference: float = 0.0
    mean_difference: float = 0.0
    relative: float = 0.0

    def line(self) -> str:
        if self.same:
            return f"{self.name}: the same"
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: largest difference {self.max_difference:.2e}, mean {self.mean_difference:.2e}, relative "
            f"{self.relative:.2e}"
        )


def compare(first: Source, second: Source) -> Iterator[Row]:
    """Rows of all tensors of either, in model order; one tensor of each is in memory. Both must have been checked."""
    mine, theirs = shapes(first.arch), shapes(second.arch)
    for name in dict.fromkeys((*mine, *theirs)):
        if name not in mine or name not in theirs:
            yield Row(name, False, f"only in {first.path if name in mine else second.path}")
        elif mine[name] != theirs[name]:
            yield Row(name, False, f"shapes {mine[name]} and {theirs[name]}")
        else:
            yield _row(name, first, second)


def _row(name: str, first: Source, second: Source) -> Row:
    a, b = first.read(name), second.read(name)
    kinds = f"{_word(a.dtype)} and {_word(b.dtype)}" if a.dtype != b.dtype else ""
    a, b = a.flatten(), b.flatten()
    if not kinds and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return Row(name, True)
    largest, total, square, norm = 0.0, 0.0, 0.0, 0.0
    for start in range(0, a.numel(), CHUNK):
        x, y = a[start : start + CHUNK].double(), b[start : start + CHUNK].double()
        difference = (x - y).abs()
        largest = max(largest, difference.max().item()) if not difference.isnan().any() else torch.nan
        total += difference.sum().item()
        square += difference.square().sum().item()
        norm += x.square().sum().item()
    if largest == 0.0:
        return Row(name, False, f"the same numbers as {kinds}" if kinds else "the same numbers, other bits (0 and -0)")
    relative = (square / norm) ** 0.5 if norm else torch.inf
    return Row(name, False, "", largest, total / a.numel(), relative)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
