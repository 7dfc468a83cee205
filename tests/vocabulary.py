"""Hidden states, a vocabulary and targets for the tests of what works on them, and a count of what crosses ranks."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from inspect import isfunction
from unittest.mock import patch

import torch
import torch.distributed as dist

from grpo_mega.types import Kept

FP64 = torch.float64
NAN = float("nan")


def problem(rows, vocab, padded, dtype=FP64, hidden=6):
    """hidden, weight (rows beyond the vocabulary are nan: whatever touches them shows), targets, two cotangents."""
    generator = torch.Generator().manual_seed(rows + vocab)
    x = torch.randn(rows, hidden, generator=generator, dtype=FP64)
    weight = torch.full((padded, hidden), NAN, dtype=FP64)
    weight[:vocab] = torch.randn(vocab, hidden, generator=generator, dtype=FP64) / 2
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[: min(rows, vocab)] = torch.arange(vocab).flip(0)[:rows]  # the last rank's tokens first
    grads = torch.randn(2, rows, generator=generator, dtype=FP64)
    return x.to(dtype), weight.to(dtype), targets, grads.to(dtype)


def some_kept(targets, vocab):
    """From one to all tokens of each row, its target among them."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(len(targets), vocab, generator=generator) < torch.linspace(0, 1, len(targets))[:, None]
    masks[torch.arange(len(targets)), targets] = True
    return Kept(*masks.nonzero(as_tuple=True))


@contextmanager
def crossings():
    """(name, elements of the largest tensor) of every collective of torch.distributed in this block."""
    seen = []
    names = [
        n for n, f in vars(dist).items() if isfunction(f) and re.match("all_|broad|gather|reduce|scatter|i?send", n)
    ]

    def counted(name, function):
        def call(*args, **kwargs):
            seen.append((name, max(a.numel() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(dist, name, counted(name, getattr(dist, name))))
        yield seen


def same_bits(values):
    return all(torch.equal(value, values[0]) for value in values)
