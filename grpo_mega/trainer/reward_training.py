"""Training a reward model: two passes an update, so that a loss may join scores whatever microbatches they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_mega.data.balance import bundle_work, partition
from grpo_mega.data.conversations import Reading, samples_of
from grpo_mega.data.packing import bundles
from grpo_mega.model.architecture import Architecture
from grpo_mega.parallel import collectives
from grpo_mega.trainer.batches import equalize, pair_cost_of
from grpo_mega.trainer.policy import Policy, Tick, silent
from grpo_mega.trainer.reward_model import scores_by_slot, slots_of
from grpo_mega.types import Mean, Metrics, Microbatch, TokenBatch

Loss = Callable[[Tensor], tuple[Tensor, Metrics]]  # scores [n] float64, in the readings' order -> (loss, metrics)


class RewardTrainer:
    """A reward model that learns.

    For a batch of n scores s and any loss L(s_1 .. s_n), dL/dw = sum_i (dL/ds_i) (ds_i/dw). The first pass computes
    all scores, without gradients; every rank has them all, and computes L and dL/ds in float64 by itself. The second
    pass differentiates sum_i (dL/ds_i) s_i, a sum over rows under the contract of `trainer/policy`, for which the
    slopes are constants. So the answers of a pair may be on different ranks, and layout and packing change nothing.
    It costs a forward more than a loss within microbatches would.
    """

    def __init__(self, policy: Policy, arch: Architecture, capacity: int):
        """policy: around a `ScoreHead`. capacity: rows of a microbatch."""
        self.policy, self._mesh, self._capacity = policy, policy.mesh, capacity
        self._pair_cost = pair_cost_of(arch)

    def scores(self, readings: Sequence[tuple[int, Reading]], tick: Tick = silent) -> Tensor:
        """[n] float64 on every rank: the scores of all places of all readings, in their order.

        readings: (group, reading), groups in runs, the same on every rank; each rank reads its share of the groups.
        Every rank must call.
        """
        return self._scored(self._batches(readings), tick)

    def update(self, readings: Sequence[tuple[int, Reading]], loss: Loss, tick: Tick = silent) -> Metrics:
        """One optimizer step on the loss of the readings' scores; its metrics, the loss and the gradient's norm on
        every rank. Every rank must call. Raises GrpoMegaError as `Policy.update`."""
        batches = self._batches(readings)
        scores = self._scored(batches, tick).requires_grad_()
        value, metrics = loss(scores)
        (slopes,) = torch.autograd.grad(value, scores)
        found = self.policy.update([_sloped(batch, slopes) for batch in batches], linear, tick)
        axis = self._mesh.pipeline
        norm = collectives.broadcast_object(found.get("grad_norm"), axis.group, axis.size - 1)
        return {"loss": Mean(float(value.detach()), 1), **metrics, "grad_norm": norm}

    def _batches(self, readings: Sequence[tuple[int, Reading]]) -> list[Microbatch]:
        """This data rank's microbatches; a reading's scores are numbered through all readings."""
        numbered, slot = [], 0
        for group, reading in readings:
            numbered.append((slot, group, reading))
            slot += len(reading.places)
        by_group: dict[int, list[tuple[int, int, Reading]]] = {}
        for triple in numbered:
            by_group.setdefault(triple[1], []).append(triple)
        runs = [samples_of(several) for several in by_group.values()]
        work = [sum(bundle_work(unit, self._pair_cost) for unit in bundles(run, self._capacity)) for run in runs]
        mine = partition(work, self._mesh.data.size)[self._mesh.data.rank]
        return equalize(
            [sample for k in mine for sample in runs[k]],
            1,
            self._capacity,
            self._mesh,
            self.policy.dtype,
            pair_cost=self._pair_cost,
        )

    def _scored(self, batches: Sequence[Microbatch], tick: Tick) -> Tensor:
        found = scores_by_slot(batches, self.policy.logprobs(batches, tick), self._mesh)
        shares = collectives.gather_objects(found, self._mesh.data.group)
        everything = {slot: score for share in shares for slot, score in share.items()}
        return torch.tensor([everything[slot] for slot in range(len(everything))], dtype=torch.float64)


def linear(scores: Tensor, _: Tensor, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """sum_i (dL/ds_i) s_i under the loss contract: loss_weights carry R, advantages the slopes."""
    return (batch.loss_weights * batch.advantages * scores).sum(), {}


def _sloped(batch: Microbatch, slopes: Tensor) -> Microbatch:
    """The microbatch with dL/ds of each scored row in the place of its number."""
    rows, slots = slots_of(batch)
    values = slopes[slots].to(batch.advantages.dtype).to(batch.advantages.device)
    return replace(batch, advantages=torch.zeros_like(batch.advantages).index_copy(0, rows, values))
