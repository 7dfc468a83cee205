"""A KL penalty in the reward: advantages that are known only once old and reference log-probs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from grpo_mega.config import Recipe
from grpo_mega.data.advantages import with_advantages
from grpo_mega.objective import kl
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.types import Group, Microbatch


def penalised(
    groups: Sequence[Group], parts: Sequence[Sequence[Microbatch]], recipe: Recipe, mesh: Mesh
) -> list[list[Microbatch]]:
    """The microbatches with the advantages of rewards that the KL estimates of their own tokens are taken off.

    groups: all of the step's. The estimate is of the policy that drew the tokens against the reference: of old
    log-probs where they were computed, else of the sampler's. Last stages know log-probs; every rank is told. A
    completion that does not count is not penalised. Every rank must call.
    """
    mine = {}
    for batch in (batch for part in parts for batch in part):
        if batch.ref_logprobs is not None and mesh.tensor.first and mesh.context.first:
            old = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
            estimate = kl.estimate(recipe.grpo.kl_estimator, old, batch.ref_logprobs).cpu()
            for order, rows in _rows(batch):
                mine[order] = estimate[rows].numpy()
    penalties: dict[int, np.ndarray] = {}
    for share in collectives.gather_objects(mine, mesh.world.group):
        penalties |= share
    # by order: every group has as many
    rollouts = [r for group in with_advantages(groups, recipe.grpo, penalties) for r in group.rollouts]

    def renewed(batch: Microbatch) -> Microbatch:
        advantages = torch.zeros_like(batch.advantages)
        for order, rows in _rows(batch):
            value = torch.tensor(rollouts[order].advantage, dtype=torch.float64)
            advantages[rows] = value.to(advantages.dtype).to(advantages.device)
        return replace(batch, advantages=advantages)

    return [[renewed(batch) for batch in part] for part in parts]


def _rows(batch: Microbatch) -> list[tuple[int, Tensor]]:
    """(order, its trained rows [n], ascending) of each completion in the microbatch."""
    trained, segments = batch.loss_weights.cpu() != 0, batch.segment_ids.cpu()
    return [
        (order, ((segments == number) & trained).nonzero().squeeze(1))
        for number, order in enumerate(batch.orders)
        if order >= 0
    ]
