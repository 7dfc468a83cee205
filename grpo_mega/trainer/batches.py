"""Groups -> microbatches of one size and number on every rank, with denominators that are known before the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

import torch

from grpo_mega.config import Recipe
from grpo_mega.data.balance import bundle_work, distribute, first_fit, partition
from grpo_mega.data.packing import bundle_rows, bundles, pack, split
from grpo_mega.data.samples import samples_from
from grpo_mega.model.architecture import Architecture
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.types import Group, Microbatch, Sample


def pair_cost_of(arch: Architecture) -> float:
    """What a (query, key) pair of attention costs, in rows: the unit of all work that is shared out.

    In FLOPs of a forward, to which a backward is proportional: a row takes 2 a weight of each layer's matrices and of
    the output layer, a pair 2 head_dim for its score and 2 head_dim for its value, in each head and layer. The output
    layer counts for every row, though an untrained row (a prompt's, mostly) never reaches it: what that overstates
    is at most the head's part of the weights, and only on those rows.
    """
    row = 2 * (arch.layer_parameters + arch.head_parameters / arch.num_layers)
    return 4 * arch.num_heads * arch.head_dim / row


def training_share(groups: Sequence[Group], recipe: Recipe, mesh: Mesh, pair_cost: float) -> list[int]:
    """The places, ascending, of the groups that this data-parallel rank trains on; groups: all of the step's, in order.

    Of each minibatch the whole groups are shared out by the work that they bring (`data/balance`, a pair of attention
    costing `pair_cost` rows), whoever sampled them. Every rank computes the same answer, and no two of them meet.
    """
    place, capacity = range(len(groups)), recipe.batch.tokens_per_microbatch
    work = [
        # a group at a time: the samples of a whole step need not be in memory at once
        sum(bundle_work(unit, pair_cost) for unit in bundles(_trained([groups[i]], [i], recipe)[0], capacity))
        for i in place
    ]
    mine = []
    for part in split(place, recipe.batch.prompts_per_step, recipe.batch.minibatches):
        shares = partition([work[i] for i in part], mesh.data.size)
        mine += [part[k] for k in shares[mesh.data.rank]]
    return mine


def minibatches(
    groups: Sequence[Group],
    positions: Sequence[int],
    recipe: Recipe,
    mesh: Mesh,
    dtype: torch.dtype,
    pair_cost: float = 0.0,
) -> list[list[Microbatch]]:
    """This rank's microbatches of each minibatch.  positions: the groups' places among the step's prompts.

    A minibatch is a run of the step's global order, and its denominator D is summed over all ranks, so that neither
    depends on the mesh. pair_cost: see `equalize`. Every rank must call.
    """
    result, reference = [], recipe.reference.layout
    for part in split(positions, recipe.batch.prompts_per_step, recipe.batch.minibatches):
        samples, denominator = _trained([groups[i] for i in part], [positions[i] for i in part], recipe)
        result.append(
            equalize(
                samples,
                collectives.sum_int(denominator, mesh.data.group, mesh.device),
                recipe.batch.tokens_per_microbatch,
                mesh,
                dtype,
                also=1 if reference is None else reference.row_multiple,
                pair_cost=pair_cost,
                fixed=recipe.batch.fixed_rows,
            )
        )
    return result


def _trained(groups: Sequence[Group], positions: Sequence[int], recipe: Recipe) -> tuple[list[Sample], int]:
    """The samples that the gradient needs, and what all samples of the groups add to D."""
    samples, denominator = samples_from(
        groups,
        positions,
        normalization=recipe.grpo.normalization,
        max_completion_tokens=recipe.sampling.max_completion_tokens,
    )
    # a sample of advantage 0 adds exactly nothing to the gradient unless a KL term or an entropy bonus does; its place
    # in D is kept
    grpo = recipe.grpo
    always = grpo.kl_coef > 0 or grpo.entropy_coef > 0 or grpo.entropy_target is not None
    return [s for s in samples if s.weight > 0 and (s.teaches or always)], denominator


def equalize(
    samples: Sequence[Sample],
    denominator: int,
    capacity: int,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    also: int = 1,
    pair_cost: float = 0.0,
    fixed: bool = False,
) -> list[Microbatch]:
    """Pack into as many microbatches as the neediest rank needs, as long as the longest one, rounded up to what tensor
    and context ranks can divide, and `also` (a reference's layout); under virtual pipeline stages a multiple of the
    pipeline's length (megatron's interleaved schedule takes them in such rounds).

    fixed: at least `capacity` rows long, so that all of a run have one shape unless a single sample is longer. A rank's
    own are of nearly equal work, a pair of attention costing `pair_cost` rows (0: by rows alone).

    Agreed over the data-parallel ranks; a rank with less to do gets padding, at least one microbatch of it, since every
    rank must take part in every collective. loss_weights carry R / D, R being the rows of all ranks.
    """
    units = bundles(samples, capacity)
    group, device = mesh.data.group, mesh.device
    multiple = lcm(also, mesh.tensor.size * (2 * mesh.context.size if mesh.context.size > 1 else 1))
    rounds = mesh.pipeline.size if mesh.virtual > 1 else 1
    needed = len(first_fit(list(map(bundle_rows, units)), capacity))
    count = -(-collectives.max_int(max(1, needed), group, device) // rounds) * rounds
    bins = distribute(units, count, capacity, pair_cost)
    longest = max(capacity if fixed else multiple, *(sum(map(bundle_rows, bin)) for bin in bins))
    rows = -(-collectives.max_int(longest, group, device) // multiple) * multiple
    scale = rows * count * mesh.data.size / max(1, denominator)
    return [pack(bin, rows, scale=scale, dtype=dtype, device=device) for bin in bins]


def with_logprobs(batches: Sequence[Microbatch], old: Sequence, ref: Sequence) -> list[Microbatch]:
    """Attach old and reference log-probs; a sequence of None where they are not needed."""
    return [replace(b, old_logprobs=o, ref_logprobs=r) for b, o, r in zip(batches, old, ref, strict=True)]
