"""What is maximised in place of the expected reward: importance ratios, and what bounds them.

    ratio             rho_t                                                    source
    token             pi(o_t) / pi_old(o_t)                                    PPO, arXiv:1707.06347; GRPO, eq. 3
    sequence          exp(mean over the completion of ln pi / pi_old) = s      GSPO, arXiv:2507.18071, eq. 7
    sequence_token    sg[s] * pi(o_t) / sg[pi(o_t)]                            GSPO-token, the same, eq. 14

    surrogate         of rho and A                                             source
    clip              min(rho A, clip(rho, 1 - low, 1 + high) A)               PPO, eq. 7; two bounds: DAPO, 2503.14476
     with dual clip   ... and for A < 0 at least c A, c > 1                    arXiv:1912.09729, eq. 5
    cispo             sg[clip(rho, 1 - low, 1 + high)] A ln pi                 MiniMax-M1, arXiv:2506.13585, eq. 4 and 5
    sapo              4 / tau * sigmoid(tau (rho - 1)) A                       SAPO, arXiv:2511.20347, eq. 5 to 7
    logprob           A ln pi                                                  REINFORCE; with A = 1 maximum likelihood

sg stops the gradient. Every surrogate comes with a mask of the tokens whose gradient the bound has taken away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.types import Segments

RATIOS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "cispo", "sapo", "logprob")


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """rho_t = pi(o_t) / pi_old(o_t) = exp(logprobs_t - old_logprobs_t), `[n]`.

    `old_logprobs=None` says that the old policy is the current one, by definition: the value is then exactly 1, with no
    second forward whose rounding could disagree, and the gradient is that of logprobs.
    """
    return torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor | None, segments: Segments) -> Tensor:
    """s_i = (pi(o_i) / pi_old(o_i))^(1 / |o_i|), on each of the completion's tokens: `[n]`. GSPO, eq. 7.

    Summed over a completion with weights 1 / |o_i| it is GSPO's one term a sequence; its gradient is the mean of the
    tokens' log-prob gradients times s_i.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    return torch.exp(segments.means(logprobs - old))


def sequence_token_ratio(logprobs: Tensor, old_logprobs: Tensor | None, segments: Segments) -> Tensor:
    """sg[s_i] pi(o_t) / sg[pi(o_t)]: GSPO's value, each token's own gradient, so that advantages may differ by token.

    `[n]`. With one advantage a completion its gradient is that of `sequence_ratio`. GSPO, eq. 14.
    """
    value = sequence_ratio(logprobs.detach(), old_logprobs, segments)
    return value * torch.exp(logprobs - logprobs.detach())


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of every token, to be maximised, and where it is clipped.

    ratio and advantages `[n]` float; the gradient reaches ratio. dual_clip c: where A < 0 the surrogate is at least
    c A, so that a token which the policy has come to prefer by a factor above c is not pushed away without limit.
    Returns the surrogate `[n]` and a bool mask `[n]`: True where the gradient is zero because of a clip, that is
    rho > 1 + clip_high with A > 0, rho < 1 - clip_low with A < 0, or rho > c with A < 0. A token beyond the range on
    the other side still learns and is not counted; nor is one with A = 0, whose gradient is zero for another reason.

    Diff from the GRPO paper: two bounds for its one epsilon (equal ones give the paper); apart, they are DAPO's
    "clip-higher", arXiv:2503.14476, section 3.1.
    """
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
    if dual_clip is not None:
        negative = advantages < 0
        surrogate = torch.where(negative, torch.maximum(surrogate, dual_clip * advantages), surrogate)
        clipped = clipped | (negative & (ratio > dual_clip))
    return surrogate, clipped


def cispo_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """sg[clip(rho, 1 - clip_low, 1 + clip_high)] A ln pi: the weight is bounded, no token loses its gradient. `[n]`.

    MiniMax-M1 leaves the lower bound open (clip_low = 1) and tunes the upper. The mask is True where the weight was
    bounded: there the token still learns, with the bound's weight.
    """
    ratio = ratio.detach()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return bounded * advantages * logprobs, bounded != ratio


def sapo_surrogate(ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """4 / tau * sigmoid(tau (rho - 1)) A, tau by the sign of A (A = 0: tau_negative, where it does not matter). `[n]`.

    The gate's slope at rho = 1 is 1, so that on-policy the gradient is A dln pi; beyond it falls softly to 0. SAPO
    recommends tau_negative > tau_positive (1.05 and 1.0). Nothing is clipped.
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative).to(ratio.dtype)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
