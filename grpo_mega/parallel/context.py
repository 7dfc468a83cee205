"""Which rows of a microbatch each context-parallel rank holds, and how rows of all of them come together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Axis


def places_of(rows: int, axis: Axis) -> Tensor:
    """`[rows / size]` ascending: which rows of a microbatch this context rank holds.

    Of 2 x size equal runs rank r has r and 2 size - 1 - r, one from either end, so that a long sequence costs every
    rank the same. Raises ValueError unless 2 x size divides the rows.
    """
    if axis.size == 1:
        return torch.arange(rows)
    if rows % (2 * axis.size):
        raise ValueError(f"{rows} rows do not divide into 2 runs for each of {axis.size} context ranks")
    runs = torch.arange(rows).view(2 * axis.size, -1)
    return torch.cat((runs[axis.rank], runs[2 * axis.size - 1 - axis.rank]))


def in_rows(mine: Tensor, axis: Axis) -> Tensor:
    """What every context rank has for its rows, in the microbatch's order: [T / size, ...] -> [T, ...]."""
    if axis.size == 1:
        return mine
    order = _order(len(mine) * axis.size, axis).to(mine.device)
    return _Gathered.apply(mine, order, axis.group)


def summed(mine: Tensor, axis: Axis) -> Tensor:
    """The sum over the context ranks, the same bits on each; every rank must call, in the backward too.

    Its gradient is the sum of theirs: the loss is what all ranks' parts of it add up to.
    """
    return mine if axis.size == 1 else _Summed.apply(mine, axis.group)


def _order(rows: int, axis: Axis) -> Tensor:
    """Which row of the microbatch each row is when the ranks' rows stand one after the other."""
    return torch.cat([places_of(rows, Axis(None, rank, axis.size)) for rank in range(axis.size)])


class _Gathered(torch.autograd.Function):
    """Rows of every context rank in the microbatch's order: [T / size, ...] -> [T, ...]."""

    @staticmethod
    def forward(ctx, mine: Tensor, order: Tensor, group: ProcessGroup) -> Tensor:
        ctx.order, ctx.group = order, group
        everyone = collectives.gather(mine, group).flatten(0, 1)
        return torch.empty_like(everyone).index_copy_(0, order, everyone)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return collectives.reduce_scatter(gradients[0][ctx.order], ctx.group), None, None


class _Summed(torch.autograd.Function):
    """Gathered and added in rank order."""

    @staticmethod
    def forward(ctx, mine: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return collectives.gather(mine, group).sum(dim=0)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return collectives.gather(gradients[0], ctx.group).sum(dim=0), None
