"""The nouns of GRPO, one word each: what travels between the rooms of the house.

Everything here is frozen. A step's data flows one way:

    Prompt -> Completion -> Rollout -> Group -> Sample -> Microbatch -> Mean

Four log-probs carry four names and are never mixed: `sampler_` (the distribution that was really sampled from,
temperature included), `old_` (the policy when the step began), `ref_` (the frozen reference) and plain `logprobs`
(the policy now). All are natural logarithms, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as it is put to the policy.

    `index` is its position in the endless prompt stream (epochs included): with the seed and the completion's
    number it keys the sampling noise, so that no parallel layout can change a draw. `row` is the whole data row,
    handed to reward functions. `messages` is the conversation that `token_ids` render, {role, content} each, for who
    reads it with another tokenizer; whole, where token_ids were cut on the left. `demonstration` is what the row says
    the policy should write, where that is trained on.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    answer: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    demonstration: Completion | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy wrote, or a row's demonstration. `token_ids` holds the stop token when one was sampled
    (`finish_reason == "stop"`).

    `sampler_logprobs[i]` is ln q(token_ids[i] | what came before), q being the distribution sampled from.
    `near_boundary` counts draws whose uniform number fell within 1e-5 of a boundary of the cumulative distribution:
    those that the rounding of another layout is most likely to decide otherwise. Under top-k or top-p, kept[i] holds
    the ids (int32, ascending) of the tokens that draw i was from; None: of all.
    A demonstration is not `drawn`: q is certain of it, and its sampler_logprobs are 0.
    """

    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str = ""
    near_boundary: int = 0
    drawn: bool = True
    kept: tuple[np.ndarray, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its reward. `error` says what failed of the reward, if something did (the reward is then 0).

    `parts` holds each part's name and value, not yet weighted (None: that part failed), in the recipe's order; it is
    empty where no function was asked (`reward.truncated: penalize`).
    `counts` is False when the completion must not take part in the loss (cut by the length limit under
    `reward.truncated: mask`): it keeps its reward in the group's statistics and gets no loss weight.
    `steps` are (index of its last token, its reward) of each reasoning step, under process supervision alone; `reward`
    is then for people: what the parts' means over the steps add up to.
    `advantage` is of every token, or one a token; None until all groups of the step are known (`data/advantages`).
    """

    completion: Completion
    reward: float
    error: str | None = None
    counts: bool = True
    parts: tuple[tuple[str, float | None], ...] = ()
    steps: tuple[tuple[int, float], ...] = ()
    advantage: float | tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The G rollouts of one prompt: what advantages are normalised over. Never split over data-parallel ranks."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: prompt and completion tokens, before the shift by one.

    `loss_mask[i]` is True where `token_ids[i]` is a completion token that is trained on. `weight` is w_t of the
    normalization (the same for every trained token of a sequence), not yet divided by the global denominator.
    `advantage` is of every completion token, or one a completion token, trained or not.
    `order` is the sample's place in the step's global order, which no layout changes; `group` is its prompt's. Samples
    of one group begin with the same `prompt_tokens` tokens, none of them trained. `kept` is the completion's.
    """

    order: int
    group: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sampler_logprobs: tuple[float, ...]
    advantage: float | tuple[float, ...]
    weight: float
    kept: tuple[np.ndarray, ...] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def teaches(self) -> bool:
        """Whether any token's advantage is not 0."""
        return any(self.advantage) if isinstance(self.advantage, tuple) else self.advantage != 0


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that each of n rows may have under top-k or top-p: pairs (row, token), [K] int64 each, rows ascending.

    A policy whose completions were drawn from such sets is the distribution renormalised over them, in every log-prob.
    """

    rows: Tensor
    tokens: Tensor

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The pairs of rows start..stop-1."""
        low, high = torch.searchsorted(self.rows, torch.tensor([start, stop], device=self.rows.device)).tolist()
        return self.rows[low:high], self.tokens[low:high]

    def take(self, which: Tensor) -> Kept:
        """The rows where `which` [n] bool is True, numbered anew."""
        pairs = which[self.rows]
        return Kept((which.cumsum(0) - 1)[self.rows[pairs]], self.tokens[pairs])


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Packed sequences: what one forward of the model sees. All `[T]` tensors are aligned with `targets`.

    `input_ids[t]` predicts `targets[t]`; the shift happened once, in `data/packing`. Segment s covers rows
    `cu_seqlens[s]` to `cu_seqlens[s + 1]`; rows from `cu_seqlens[-1]` to T are padding, belong to no segment
    (`segment_ids == -1`) and attend to nothing. A segment with `prefixes[s] >= 0` goes on from that segment's rows and
    sees them all: so the completions of a group share one copy of their prompt.

    input_ids, targets, position_ids, segment_ids   [T] int64
    loss_weights                                    [T] float, w_t * R / D; 0 where not trained
    advantages, sampler_logprobs                    [T] float; 0 where not trained
    old_logprobs, ref_logprobs                      [T] float or None while not computed (None: not needed)
    cu_seqlens                                      [S + 1] int32
    prefixes                                        S ints: a segment's number, or -1
    orders                                          S ints: its sample's place in the step, -1 of a prompt's segment
    kept                                            None, or the tokens that each trained row was drawn from; its rows
                                                    are counted among the trained ones (loss_weights != 0)
    routes                                          {layer: [rows of this rank, k] int64}: the experts that the pass for
                                                    old_logprobs chose, where updates replay them; else empty
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    loss_weights: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    cu_seqlens: Tensor
    prefixes: tuple[int, ...]
    orders: tuple[int, ...] = ()
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kept: Kept | None = None
    routes: Any = field(default_factory=dict)  # one for all copies of the microbatch: `replace` keeps it

    @property
    def rows(self) -> int:
        """T: the rows of this microbatch, padding included (what is handed to megatron as the count)."""
        return self.input_ids.numel()

    def part(self, places: Tensor) -> Microbatch:
        """The rows `places` [n] int64, ascending, as one context rank holds them; segments are still the whole's."""
        rows = {name: getattr(self, name)[places] for name in ("input_ids", "targets", "position_ids", "segment_ids")}
        for name in ("loss_weights", "advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs"):
            values = getattr(self, name)
            rows[name] = None if values is None else values[places]
        kept = self.kept
        if kept is not None:
            here = torch.zeros_like(self.loss_weights, dtype=torch.bool).index_fill(0, places, True)
            kept = kept.take(here[self.loss_weights != 0])
        return replace(self, **rows, kept=kept)

    def with_logprobs(self, *, old: Tensor | None, ref: Tensor | None) -> Microbatch:
        """The same microbatch with `[T]` log-probs of the step's first policy and of the reference."""
        return replace(self, old_logprobs=old, ref_logprobs=ref)

    def take(self, rows: Tensor) -> TokenBatch:
        """What an objective needs of the given rows, `rows` [n] int64."""
        return TokenBatch(
            self.loss_weights, self.advantages, self.sampler_logprobs, self.old_logprobs, self.ref_logprobs
        ).at(rows)


def _all(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True, slots=True)
class Segments:
    """Which sequence each of n tokens belongs to, and sums over whole sequences wherever their tokens lie.

    ids [n] int64 in [0, count): a token's sequence. total: sums [count] over these tokens -> over all tokens of those
    sequences, differentiable; where context-parallel ranks hold parts of a sequence it adds over them (every one of
    them must call), and by default these tokens are all there are.
    """

    ids: Tensor
    count: int
    total: Callable[[Tensor], Tensor] = _all

    def sums(self, values: Tensor) -> Tensor:
        """[n] -> [n]: each token gets the sum of `values` over its whole sequence. Differentiable."""
        return self.total(values.new_zeros(self.count).index_add(0, self.ids, values))[self.ids]

    def means(self, values: Tensor) -> Tensor:
        """[n] -> [n]: each token gets the mean of `values` over the tokens of its sequence. Differentiable."""
        return self.sums(values) / self.sums(torch.ones_like(values, requires_grad=False))


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The trained tokens of a microbatch, `[n]` each, aligned with their log-probs: all that an objective sees."""

    loss_weights: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    segments: Segments | None = None  # their sequences, where all tokens of the microbatch's come at once

    def at(self, where: slice | Tensor) -> TokenBatch:
        """Some of the tokens: a run of them, or those of an index [n] int64. Their sequences are no longer whole."""
        return TokenBatch(
            loss_weights=self.loss_weights[where],
            advantages=self.advantages[where],
            sampler_logprobs=self.sampler_logprobs[where],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[where],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[where],
        )


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that has not been divided yet: adds over microbatches and ranks, is divided once, at the edge."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """total / count; nan for a mean of nothing."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


Metrics = dict[str, Mean]


def add_metrics(*several: Metrics) -> Metrics:
    """Key-wise sum; a key that one side lacks counts as nothing there."""
    result: Metrics = {}
    for metrics in several:
        for key, mean in metrics.items():
            result[key] = result[key] + mean if key in result else mean
    return result
