"""The clipped surrogate: PPO, arXiv:1707.06347, eq. 7; DeepSeekMath, arXiv:2402.03300, eq. 3 (its first term)."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """rho_t = pi(o_t) / pi_old(o_t) = exp(logprobs_t - old_logprobs_t), `[n]`.

    `old_logprobs=None` says that the old policy is the current one, by definition: the value is then exactly 1, with no
    second forward whose rounding could disagree, and the gradient is that of logprobs.
    """
    return torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of every token, to be maximised, and where it is clipped.

    logprobs, old_logprobs (nats; None: see `importance_ratio`) and advantages `[n]` float; gradient reaches logprobs.
    Returns the surrogate `[n]` and a bool mask `[n]`: True where the gradient is zero because of the clip, that is
    rho > 1 + clip_high with A > 0, or rho < 1 - clip_low with A < 0. A token beyond the range on the other side still
    learns and is not counted; nor is one with A = 0, whose gradient is zero for another reason.

    Diff from the paper: two bounds for its one epsilon (equal ones give the paper); apart, they are DAPO's
    "clip-higher", arXiv:2503.14476, section 3.1.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    return surrogate, clipped
