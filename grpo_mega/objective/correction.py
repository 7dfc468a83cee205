"""Tokens that another distribution drew: weights between sampler and trainer, sequences too stale to learn from.

Sampler and trainer compute the same policy with other kernels, another precision, or weights that are some updates old.
With w = pi_old / q, q being what was sampled from, the surrogate is multiplied by a constant made of w:

    correction   level       weight                              source
    truncate     token       min(w_t, high)                      TIS: Yao et al., "Your efficient RL framework secretly
                 sequence    min(prod_t w_t, high)                 brings you off-policy RL training", 2025
    mask         token       w_t if low <= w_t <= high, else 0   IcePop: arXiv:2510.18855
                 sequence    the same of prod_t w_t              MIS: Liu et al., "When speed kills stability", 2025
                 geometric   of (prod_t w_t)^(1 / |o|)             (geometric: its length-free form)
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.types import Segments

CORRECTIONS = ("none", "truncate", "mask")
LEVELS = ("token", "sequence", "geometric")


def sampler_correction(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    kind: str,
    level: str,
    low: float,
    high: float,
    segments: Segments | None = None,
) -> Tensor:
    """The weight of each token, `[n]`, a constant: see the module's table.

    old_logprobs, sampler_logprobs `[n]` nats. low is for masks alone. segments: needed for the levels above a token.
    """
    log_weight = (old_logprobs - sampler_logprobs).detach()
    if level != "token":
        if segments is None:
            raise ValueError(f"a correction of level {level} needs the tokens' sequences")
        log_weight = segments.sums(log_weight) if level == "sequence" else segments.means(log_weight)
    weight = torch.exp(log_weight)
    if kind == "truncate":
        return weight.clamp(max=high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def off_policy_mask(
    logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, threshold: float, segments: Segments | None
) -> Tensor:
    """0 where A_t < 0 and the completion's mean of ln q - ln pi exceeds `threshold`, else 1: `[n]`, a constant.

    DeepSeek-V3.2, arXiv:2512.02556, section 3.1 (off-policy sequence masking): a completion that the policy has moved
    away from is not pushed away further. The mean, in nats a token, is over all of its tokens; q is what was sampled
    from, so that a mismatch of the sampler counts like staleness.
    """
    if segments is None:
        raise ValueError("the off-policy mask needs the tokens' sequences")
    drift = segments.means((sampler_logprobs - logprobs).detach())
    return torch.where((advantages < 0) & (drift > threshold), 0.0, torch.ones_like(drift))
