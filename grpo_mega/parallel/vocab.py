"""The policy's log-probs, entropies and loss from a vocabulary that is cut over ranks: full logits never exist.

Rank r holds rows `[r * P, (r + 1) * P)` of the output layer, P = padded vocabulary / ranks. Logits exist a tile at a
time: a chunk of rows on the rank's own slice. Per row each rank reduces its own to four numbers

    m = max_j z_j,   s = sum_j exp(z_j - m),   e = sum_j exp(z_j - m) (z_j - m),   z_y (0 where the target is elsewhere)

which travel in one all-gather a chunk and are merged in rank order (`head.merge`), so that every rank computes the same
bits. With ln Z known, the gradient of a token's loss is

    dL/dz_j = g_y (1[j = y] - p_j) - g_H p_j (ln p_j + H),   g_y = dL/d ln p(y),  g_H = dL/dH

- `logprobs_and_entropies` is differentiable in the usual way, in two sweeps: the backward multiplies h W^T again,
  2 + 2 + 4 = 8 operations a token, element of the slice and hidden unit. Sequence-level objectives need it.
- `one_sweep_loss` is for objectives that are sums over tokens: there g_y and g_H of a chunk are known as soon as its
  rows are, so that one product serves both, 6 operations. The sweep runs in the backward.

Both take everything in max(float32, input dtype), add the weight's gradient to `main_grad` where megatron keeps one,
and sum the hidden states' gradient over the ranks before it is rounded. `group=None` is the dense reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_mega.parallel import collectives, products, weight_gradient
from grpo_mega.parallel.head import Head, Tiles, merge
from grpo_mega.types import Metrics, add_metrics

# (log-probs [c], entropies [c], which of the n rows) -> (sum of weighted token losses, metrics)
TokenObjective = Callable[[Tensor, Tensor, slice], tuple[Tensor, Metrics]]


def logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """ln p(targets | hidden) and the entropy of p, in nats; differentiable in `hidden` and `weight`.

    hidden [T, H], replicated over the group ([T / ranks, H] under sequence parallelism); weight [P, H], this rank's
    slice; rows [n] int64, which of the T enter (None: all); targets [n] int64, their global token ids. options: the
    fields of `Head`. Returns two `[n]` tensors of dtype max(float32, hidden.dtype), the same on every rank.

    Raises ValueError for shapes, dtypes or a temperature that cannot be, GrpoMegaError for targets outside the
    vocabulary and hidden states that are not finite: on every rank, before the operator's own collectives.
    """
    head = Head(**options)
    head.check(hidden, weight, targets, rows)
    return _TwoSweeps.apply(hidden, weight, targets, rows, head)


def one_sweep_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: TokenObjective,
    report: Callable[[Tensor, Metrics], None],
    *,
    rows: Tensor | None = None,
    **options,
) -> Tensor:
    """A scalar 0 whose backward computes the loss, its gradients and metrics; `report` gets the loss and the metrics.

    Arguments and errors as in `logprobs_and_entropies` (under sequence parallelism values are looked at in the
    backward). objective: pure; it is called once a chunk with log-probs and entropies that want a gradient, and its
    losses and metrics are added up. The upstream gradient scales what goes into gradients, not what is reported.
    Without a backward nothing is computed, written or reported.
    """
    head = Head(**options)
    head.check(hidden, weight, targets, rows)
    if not head.sequence_parallel:
        head.check_values(head.rows_of(hidden.detach(), rows), targets)
    return _OneSweep.apply(hidden, weight, _Job(targets, rows, head, objective, report))


@dataclass(frozen=True)
class _Job:
    targets: Tensor
    rows: Tensor | None
    head: Head
    objective: TokenObjective
    report: Callable[[Tensor, Metrics], None]


class _TwoSweeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, head):
        entering = head.rows_of(hidden, rows)
        head.check_values(entering, targets)
        tiles = Tiles.of(head, entering, weight, targets)
        log_z, logprobs, entropies = (
            torch.empty(len(targets), dtype=tiles.dtype, device=hidden.device) for _ in range(3)
        )
        waiting: list[tuple[slice, Callable[[], Tensor]]] = []

        def take_in() -> None:
            for where, arrived in waiting:
                log_z[where], logprobs[where], entropies[where] = merge(arrived())
            waiting.clear()

        for where in tiles:
            if where.start == where.stop:
                continue
            stats = tiles.statistics(where, tiles.logits(where))  # while the last chunk's numbers travel
            take_in()
            waiting.append((where, collectives.gather_later(stats, head.group)))
        take_in()
        ctx.save_for_backward(hidden, weight, targets, rows, log_z, entropies)
        ctx.head = head
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, targets, rows, log_z, entropies = ctx.saved_tensors
        head = ctx.head
        entering = head.rows_of(hidden, rows)
        tiles = Tiles.of(head, entering, weight, targets)
        sums = _Gradients(tiles, weight)
        for where in tiles:
            z = tiles.logits(where)
            sums.add(where, z, log_z[where], entropies[where], grad_logprobs[where], grad_entropies[where])
        return sums.of_hidden(rows, hidden), sums.of_weight(), None, None, None


class _OneSweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, job):
        ctx.save_for_backward(hidden, weight)
        ctx.job = job
        return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (hidden, weight), job = ctx.saved_tensors, ctx.job
        head, rows = job.head, job.rows
        entering = head.rows_of(hidden, rows)
        if head.sequence_parallel:
            head.check_values(entering, job.targets)
        tiles = Tiles.of(head, entering, weight, job.targets)
        sums = _Gradients(tiles, weight)
        total, metrics = entering.new_zeros((), dtype=tiles.dtype), {}
        for where in tiles:
            z = tiles.logits(where)
            stats = tiles.statistics(where, z)
            log_z, logprobs, entropies = merge(collectives.gather(stats, head.group if len(z) else None))
            loss, more, (g_y, g_h) = _differentiate(job.objective, logprobs, entropies, where)
            total, metrics = total + loss, add_metrics(metrics, more)
            sums.add(where, z, log_z, entropies, g_y * upstream, None if g_h is None else g_h * upstream)
        job.report(total, metrics)
        return sums.of_hidden(rows, hidden), sums.of_weight(), None


def _differentiate(objective: TokenObjective, logprobs: Tensor, entropies: Tensor, where: slice):
    """(loss, metrics, (dL/d logprobs, dL/d entropies or None)) of a chunk, by autograd over its small vectors."""
    with torch.enable_grad():
        leaves = logprobs.requires_grad_(), entropies.requires_grad_()
        loss, metrics = objective(*leaves, where)
        g_y, g_h = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
    return loss.detach(), metrics, (torch.zeros_like(logprobs) if g_y is None else g_y, g_h)


class _Gradients:
    """Sums over chunks: the hidden rows' gradient and the weight's."""

    def __init__(self, tiles: Tiles, weight: Tensor):
        self.tiles, self.weight = tiles, weight
        self.hidden = torch.empty(tiles.hidden.shape, dtype=tiles.dtype, device=weight.device)
        self.accumulator = weight_gradient.accumulator(weight, tiles.dtype)

    def add(self, where: slice, z: Tensor, log_z: Tensor, entropies: Tensor, g_y: Tensor, g_h: Tensor | None) -> None:
        """z: the chunk's logits, which become its gradient."""
        tiles, live = self.tiles, self.tiles.part.valid
        dz = tiles.gradient(where, z, log_z, entropies, g_y, g_h)
        self.hidden[where] = products.through_rows(dz, self.weight[:live])
        products.accumulate_(self.accumulator[:live], dz, tiles.hidden[where])

    def of_hidden(self, rows: Tensor | None, hidden: Tensor) -> Tensor:
        return self.tiles.head.hidden_gradient(self.hidden, rows, hidden)

    def of_weight(self) -> Tensor:
        return weight_gradient.for_autograd(self.weight, self.accumulator)
