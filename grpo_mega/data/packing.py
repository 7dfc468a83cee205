"""Samples -> microbatches. The shift by one and the padding happen here and nowhere else.

A sample of n tokens is a segment of n - 1 rows: row t reads token t and predicts token t + 1, so its loss weight,
advantage and sampler log-prob are those of token t + 1. What is trained on is what the sample's mask says; token ids
are never asked (a sampled pad token is trained on like any other).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from grpo_mega.types import Microbatch, Sample


def row_lengths(samples: Sequence[Sample]) -> list[int]:
    """Rows of each sample's segment: its tokens less one."""
    return [len(sample) - 1 for sample in samples]


def split(positions: Sequence[int], prompts: int, minibatches: int) -> list[list[int]]:
    """Which of the groups at hand belong to each minibatch, as indices into `positions`, in ascending position.

    positions: the places of these groups among the step's `prompts` groups. Minibatch k holds the positions in
    [k * prompts / minibatches, (k + 1) * prompts / minibatches), wherever their groups are: the mesh has no say in it.
    Raises ValueError when `minibatches` does not divide `prompts` or a position is outside [0, prompts).
    """
    if minibatches < 1 or prompts % minibatches:
        raise ValueError(f"{prompts} prompts do not split into {minibatches} equal minibatches")
    parts: list[list[int]] = [[] for _ in range(minibatches)]
    for i in sorted(range(len(positions)), key=positions.__getitem__):
        if not 0 <= positions[i] < prompts:
            raise ValueError(f"position {positions[i]} is outside the step's {prompts} prompts")
        parts[positions[i] * minibatches // prompts].append(i)
    return parts


def first_fit(lengths: Sequence[int], capacity: int) -> int:
    """How many microbatches of `capacity` rows first-fit-decreasing needs for segments of these lengths.

    A segment longer than capacity gets a microbatch of its own, which then exceeds the capacity: nothing is ever cut.
    """
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        for i, load in enumerate(loads):
            if load + length <= capacity:
                loads[i] += length
                break
        else:
            loads.append(length)
    return len(loads)


def partition(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Segments into exactly `bins` bins of nearly equal load: the longest next, always into the least loaded bin.

    Returns the indices into `lengths` of each bin, ascending; a bin may be empty. Ties go to the lower index and the
    lower bin, so the answer depends on the lengths alone. The largest load is at most the mean plus the longest.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins cannot hold {len(lengths)} segments; use at least 1")
    parts: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, b) for b in range(bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = loads[0]
        heapq.heapreplace(loads, (load + lengths[i], b))
        parts[b].append(i)
    return [sorted(part) for part in parts]


def pack(
    samples: Sequence[Sample], rows: int, *, scale: float, dtype: torch.dtype, device: torch.device | str
) -> Microbatch:
    """The samples one after another in a microbatch of exactly `rows` rows; the rows left over are padding at the end.

    loss_weights = Sample.weight * scale where trained, computed in float64 and rounded once to `dtype` (scale is R / D,
    see Microbatch); advantages and sampler_logprobs are of `dtype` too. position_ids start at 0 in every segment.
    Padding: segment_ids -1, everything else 0; cu_seqlens `[S + 1]` ends before it.

    Raises ValueError when the segments need more rows, or when a sample has no row or trains its first token (which
    nothing predicts).
    """
    lengths = row_lengths(samples)
    if sum(lengths) > rows:
        raise ValueError(f"segments of {sum(lengths)} rows do not fit into {rows}; nothing is ever cut")
    ids = {name: torch.zeros(rows, dtype=torch.int64) for name in ("input_ids", "targets", "position_ids")}
    ids["segment_ids"] = torch.full((rows,), -1)
    values = {
        name: torch.zeros(rows, dtype=torch.float64) for name in ("loss_weights", "advantages", "sampler_logprobs")
    }
    starts = [0]
    for s, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        if length < 1 or sample.loss_mask[0]:
            raise ValueError(f"sample {sample.order} of {len(sample)} tokens: nothing predicts its first token")
        here = slice(starts[-1], starts[-1] + length)
        tokens = torch.tensor(sample.token_ids)
        trained = torch.tensor(sample.loss_mask[1:])
        ids["input_ids"][here], ids["targets"][here] = tokens[:-1], tokens[1:]
        ids["position_ids"][here], ids["segment_ids"][here] = torch.arange(length), s
        logprobs = torch.tensor(sample.sampler_logprobs[1:], dtype=torch.float64)
        values["loss_weights"][here][trained] = sample.weight * scale
        values["advantages"][here][trained] = sample.advantage
        values["sampler_logprobs"][here][trained] = logprobs[trained]
        starts.append(here.stop)
    return Microbatch(
        **{name: tensor.to(device) for name, tensor in ids.items()},
        **{name: tensor.to(dtype).to(device) for name, tensor in values.items()},
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        max_seqlen=max(lengths, default=0),
    )
