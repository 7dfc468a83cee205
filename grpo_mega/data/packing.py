"""Samples -> microbatches. The shift by one and the padding happen here and nowhere else.

A sample of n tokens is n - 1 rows: row t reads token t and predicts token t + 1, so its loss weight, advantage and
sampler log-prob are those of token t + 1. What is trained on is what the sample's mask says; token ids are never asked
(a sampled pad token is trained on like any other).

Completions of one prompt that travel in one microbatch form a bundle and share the prompt: of a prompt of p tokens the
first p - 1 are one segment, computed once; each completion's segment then begins with the prompt's last token, whose
prediction is the completion's first. The sums are the same, with (G - 1)(p - 1) rows fewer a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_mega.types import Kept, Microbatch, Sample

Bundle = list[Sample]


def bundles(samples: Sequence[Sample], capacity: int) -> list[Bundle]:
    """Runs of samples of one group, each of at most `capacity` rows (a single sample may exceed it: nothing is cut)."""
    result: list[Bundle] = []
    for sample in samples:
        if result and result[-1][0].group == sample.group and bundle_rows([*result[-1], sample]) <= capacity:
            result[-1].append(sample)
        else:
            result.append([sample])
    return result


def bundle_rows(bundle: Bundle) -> int:
    """Rows of a bundle: the prompt's but the last once, and each completion's."""
    shared = bundle[0].prompt_tokens - 1
    return shared + sum(len(sample) - 1 - shared for sample in bundle)


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


def pack(
    bundles: Sequence[Bundle], rows: int, *, scale: float, dtype: torch.dtype, device: torch.device | str
) -> Microbatch:
    """The bundles one after another in a microbatch of exactly `rows` rows; the rows left over are padding at the end.

    loss_weights = Sample.weight * scale where trained, computed in float64 and rounded once to `dtype` (scale is R / D,
    see Microbatch); advantages and sampler_logprobs are of `dtype` too. position_ids start at 0 in every sequence.
    Padding: segment_ids -1, everything else 0; cu_seqlens `[S + 1]` ends before it.

    Raises ValueError when the segments need more rows, when a sample has no row or trains a token of its prompt, and
    when the samples of a bundle do not begin with the same prompt.
    """
    used = sum(map(bundle_rows, bundles))
    if used > rows:
        raise ValueError(f"segments of {used} rows do not fit into {rows}; nothing is ever cut")
    ids = {name: torch.zeros(rows, dtype=torch.int64) for name in ("input_ids", "targets", "position_ids")}
    ids["segment_ids"] = torch.full((rows,), -1)
    values = {
        name: torch.zeros(rows, dtype=torch.float64) for name in ("loss_weights", "advantages", "sampler_logprobs")
    }
    starts = [0]
    prefixes: list[int] = []
    orders: list[int] = []
    kept: list[np.ndarray] = []
    for sample, begin, end, prefix in _segments(bundles):
        here = slice(starts[-1], starts[-1] + end - begin)
        tokens = torch.tensor(sample.token_ids[begin : end + 1])
        trained = torch.tensor(sample.loss_mask[begin + 1 : end + 1])
        ids["input_ids"][here], ids["targets"][here] = tokens[:-1], tokens[1:]
        ids["position_ids"][here], ids["segment_ids"][here] = torch.arange(begin, end), len(prefixes)
        logprobs = torch.tensor(sample.sampler_logprobs[begin + 1 : end + 1], dtype=torch.float64)
        values["loss_weights"][here][trained] = sample.weight * scale
        values["advantages"][here][trained] = _advantages(sample)[begin + 1 : end + 1][trained]
        values["sampler_logprobs"][here][trained] = logprobs[trained]
        if sample.kept is not None and sample.weight * scale != 0:
            kept += [sample.kept[t + 1 - sample.prompt_tokens] for t in range(begin, end) if sample.loss_mask[t + 1]]
        starts.append(here.stop)
        prefixes.append(prefix)
        orders.append(sample.order if end >= sample.prompt_tokens else -1)
    return Microbatch(
        **{name: tensor.to(device) for name, tensor in ids.items()},
        **{name: tensor.to(dtype).to(device) for name, tensor in values.items()},
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        prefixes=tuple(prefixes),
        orders=tuple(orders),
        kept=_kept(kept, device) if any(sample.kept is not None for bundle in bundles for sample in bundle) else None,
    )


def _advantages(sample: Sample) -> Tensor:
    """[len(sample)] float64: each token's, 0 in the prompt."""
    values = torch.zeros(len(sample), dtype=torch.float64)
    values[sample.prompt_tokens :] = torch.tensor(sample.advantage, dtype=torch.float64)
    return values


def _kept(sets: Sequence[np.ndarray], device: torch.device | str) -> Kept:
    """One set a trained row -> pairs."""
    rows = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([len(s) for s in sets], dtype=torch.int64))
    tokens = torch.from_numpy(np.concatenate([*sets, np.empty(0, np.int32)]).astype(np.int64))
    return Kept(rows.to(device), tokens.to(device))


def _segments(bundles: Sequence[Bundle]) -> Iterator[tuple[Sample, int, int, int]]:
    """Of each segment: its sample, its first row and the row after its last within the sequence, its prefix or -1."""
    number = 0
    for bundle in bundles:
        shared = bundle[0].prompt_tokens - 1 if len(bundle) > 1 else 0
        prompt = bundle[0].token_ids[: bundle[0].prompt_tokens]
        for sample in bundle:
            if len(sample) < 2 or any(sample.loss_mask[: sample.prompt_tokens]):
                raise ValueError(
                    f"sample {sample.order} of {len(sample)} tokens: nothing predicts its first trained token"
                )
            if sample.token_ids[: sample.prompt_tokens] != prompt:
                raise ValueError(f"samples {bundle[0].order} and {sample.order} of one bundle have different prompts")
        prefix = -1
        if shared:
            yield bundle[0], 0, shared, -1
            prefix, number = number, number + 1
        for sample in bundle:
            yield sample, shared, len(sample) - 1, prefix
            number += 1
