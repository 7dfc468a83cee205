"""The objective of GRPO, DeepSeekMath, arXiv:2402.03300, eq. 3, and of the family that grew from it, term by term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.objective import kl
from grpo_mega.objective.correction import off_policy_mask, sampler_correction
from grpo_mega.objective.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    importance_ratio,
    sapo_surrogate,
    sequence_ratio,
    sequence_token_ratio,
)
from grpo_mega.types import Mean, Metrics, TokenBatch


@dataclass(frozen=True)
class Terms:
    """Which terms the loss has, and their numbers; the defaults are DeepSeekMath's. See the modules for each."""

    ratio: str = "token"
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tau_positive: float = 1.0  # of sapo
    tau_negative: float = 1.05
    kl_coef: float = 0.04  # of a penalty in the loss; one in the reward is in the advantages already
    kl_estimator: str = "k3"
    kl_unbiased: bool = False
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_level: str = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0
    off_policy_threshold: float | None = None
    sampled: bool = True  # False: the tokens are demonstrations, and their sampler_logprobs are no sampler's

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's term depends on other tokens of its completion."""
        of_correction = self.correction != "none" and self.correction_level != "token"
        return self.ratio != "token" or of_correction or self.off_policy_threshold is not None


def grpo_loss(logprobs: Tensor, entropies: Tensor, tokens: TokenBatch, terms: Terms) -> tuple[Tensor, Metrics]:
    """loss = sum_t loss_weights_t * (kl_coef KL_t - c_t m_t S_t - entropy_coef H_t), to be minimised; and metrics.

    S_t is the surrogate of the ratio rho_t and the advantage A_t, KL_t the penalty's estimate (times rho_t where it is
    to be unbiased), c_t the correction of the sampler, m_t the off-policy mask, H_t the entropy of pi at t. With the
    defaults: sum_t loss_weights_t (kl_coef k3_t - min(rho_t A_t, clip(rho_t) A_t)).

    logprobs, entropies and tokens' fields are `[n]` float over the trained tokens alone (n = 0 is legal: a zero that
    still has a gradient), in nats. tokens.old_logprobs None: the old policy is the current one. ref_logprobs may be
    None if kl_coef is 0; segments if no term needs sequences. The loss is a scalar of logprobs' dtype.

    Diff from the paper: a sum, not a mean. The paper's 1/G 1/|o_i| is in loss_weights (w_t * R / D, see `normalization`
    and `Microbatch`), so that the loss adds over microbatches and ranks. Two clip bounds for one: see `surrogate`.

    Metrics are means over tokens, unweighted, detached, float64 totals: clip_fraction; ratio (rho); kl (the estimator,
    where a reference is given); entropy; logprob; sampler_mismatch, mean |ln pi_old - ln q| with q what was really
    sampled from (0 when the sampler is exact; left out where nothing was sampled); where the terms are in use,
    correction_weight (c) and on_policy (m).
    Raises ConfigError for kl_coef without a reference.
    """
    ratio = _ratio(logprobs, tokens, terms)
    surrogate, clipped = _surrogate(ratio, logprobs, tokens.advantages, terms)
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    values = {
        "clip_fraction": clipped,
        "ratio": ratio,
        "entropy": entropies,
        "logprob": logprobs,
    }
    if terms.sampled:
        values["sampler_mismatch"] = (old - tokens.sampler_logprobs).abs()
    constants = _constants(logprobs, old, tokens, terms)
    for constant in constants.values():
        surrogate = surrogate * constant
    values |= constants
    token_loss = -surrogate
    if tokens.ref_logprobs is not None:
        values["kl"] = kl.estimate(terms.kl_estimator, logprobs, tokens.ref_logprobs)
        if terms.kl_coef != 0:
            rho = importance_ratio(logprobs, tokens.old_logprobs) if terms.kl_unbiased else 1.0
            token_loss = token_loss + terms.kl_coef * rho * values["kl"]
    elif terms.kl_coef != 0:
        raise ConfigError(
            f"grpo.kl_coef={terms.kl_coef} needs ref_logprobs, which were not computed; or set grpo.kl_coef=0"
        )
    if terms.entropy_coef != 0:
        token_loss = token_loss - terms.entropy_coef * entropies
    loss = (tokens.loss_weights * token_loss).sum()
    return loss, {name: Mean(value.detach().double().sum(), value.numel()) for name, value in values.items()}


def _constants(logprobs: Tensor, old_logprobs: Tensor, tokens: TokenBatch, terms: Terms) -> dict[str, Tensor]:
    """What the surrogate is multiplied with besides the advantage, under the names of their metrics."""
    found = {}
    if terms.correction != "none":
        kind, level, low, high = (
            getattr(terms, name) for name in ("correction", "correction_level", "correction_low", "correction_high")
        )
        found["correction_weight"] = sampler_correction(
            old_logprobs, tokens.sampler_logprobs, kind, level, low, high, tokens.segments
        )
    if terms.off_policy_threshold is not None:
        found["on_policy"] = off_policy_mask(
            logprobs, tokens.sampler_logprobs, tokens.advantages, terms.off_policy_threshold, tokens.segments
        )
    return found


def _ratio(logprobs: Tensor, tokens: TokenBatch, terms: Terms) -> Tensor:
    if terms.ratio == "token":
        return importance_ratio(logprobs, tokens.old_logprobs)
    if tokens.segments is None:
        raise ValueError(f"grpo.ratio={terms.ratio} needs the tokens' sequences")
    of_sequence = sequence_ratio if terms.ratio == "sequence" else sequence_token_ratio
    return of_sequence(logprobs, tokens.old_logprobs, tokens.segments)


def _surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    match terms.surrogate:
        case "clip":
            return clipped_surrogate(ratio, advantages, terms.clip_low, terms.clip_high, terms.dual_clip)
        case "cispo":
            return cispo_surrogate(ratio, logprobs, advantages, terms.clip_low, terms.clip_high)
        case "sapo":
            surrogate = sapo_surrogate(ratio, advantages, terms.tau_positive, terms.tau_negative)
        case _:
            surrogate = advantages * logprobs
    return surrogate, ratio.new_zeros(ratio.shape, dtype=torch.bool)
