"""Groups -> microbatches of one size and number on every rank, with denominators that are known before the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

import torch

from grpo_mega.config import Recipe
from grpo_mega.data.packing import bundle_rows, bundles, first_fit, pack, partition, split
from grpo_mega.data.samples import samples_from
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.types import Group, Microbatch, Sample


def minibatches(
    groups: Sequence[Group], positions: Sequence[int], recipe: Recipe, mesh: Mesh, dtype: torch.dtype
) -> list[list[Microbatch]]:
    """This rank's microbatches of each minibatch.  positions: the groups' places among the step's prompts.

    A minibatch is a run of the step's global order, and its denominator D is summed over all ranks, so that neither
    depends on the mesh. Every rank must call.
    """
    parts = split(positions, recipe.batch.prompts_per_step, recipe.batch.minibatches)
    return [_minibatch([groups[i] for i in part], [positions[i] for i in part], recipe, mesh, dtype) for part in parts]


def _minibatch(
    groups: Sequence[Group], positions: Sequence[int], recipe: Recipe, mesh: Mesh, dtype: torch.dtype
) -> list[Microbatch]:
    samples, denominator = samples_from(
        groups,
        positions,
        normalization=recipe.grpo.normalization,
        max_completion_tokens=recipe.sampling.max_completion_tokens,
    )
    denominator = collectives.sum_int(denominator, mesh.data.group, mesh.device)
    # without a KL term a sample of advantage 0 adds exactly nothing to the gradient; its place in D is kept
    samples = [s for s in samples if s.weight > 0 and (s.advantage != 0 or recipe.grpo.kl_coef > 0)]
    reference = recipe.reference.layout
    also = 1 if reference is None else reference.row_multiple
    return equalize(samples, denominator, recipe.batch.tokens_per_microbatch, mesh, dtype, also)


def equalize(
    samples: Sequence[Sample], denominator: int, capacity: int, mesh: Mesh, dtype: torch.dtype, also: int = 1
) -> list[Microbatch]:
    """Pack into as many microbatches as the neediest rank needs, as long as the longest one, rounded up to what tensor
    and context ranks can divide, and `also` (a reference's layout); under virtual pipeline stages a multiple of the
    pipeline's length (megatron's interleaved schedule takes them in such rounds).

    Agreed over the data-parallel ranks; a rank with less to do gets padding, at least one microbatch of it, since every
    rank must take part in every collective. loss_weights carry R / D, R being the rows of all ranks.
    """
    units = bundles(samples, capacity)
    lengths = [bundle_rows(unit) for unit in units]
    group, device = mesh.data.group, mesh.device
    count = collectives.max_int(_count(lengths, capacity), group, device)
    rounds = mesh.pipeline.size if mesh.virtual > 1 else 1
    count = -(-count // rounds) * rounds
    multiple = lcm(also, mesh.tensor.size * (2 * mesh.context.size if mesh.context.size > 1 else 1))
    bins = partition(lengths, count)
    longest = max(multiple, *(sum(lengths[i] for i in bin) for bin in bins))
    rows = -(-collectives.max_int(longest, group, device) // multiple) * multiple
    scale = rows * count * mesh.data.size / max(1, denominator)
    return [pack([units[i] for i in bin], rows, scale=scale, dtype=dtype, device=device) for bin in bins]


def _count(lengths: Sequence[int], capacity: int) -> int:
    """The fewest balanced bins, from first-fit's number on, none of them above the capacity (or the longest unit)."""
    count, limit = max(1, first_fit(lengths, capacity)), max(capacity, *lengths, 0)
    while max(sum(lengths[i] for i in bin) for bin in partition(lengths, count)) > limit:
        count += 1
    return count


def with_logprobs(batches: Sequence[Microbatch], old: Sequence, ref: Sequence) -> list[Microbatch]:
    """Attach old and reference log-probs; a sequence of None where they are not needed."""
    return [replace(b, old_logprobs=o, ref_logprobs=r) for b, o, r in zip(batches, old, ref, strict=True)]
