"""The GRPO objective: DeepSeekMath, arXiv:2402.03300, eq. 3."""

from __future__ import annotations

from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.objective.kl import k3
from grpo_mega.objective.surrogate import clipped_surrogate, importance_ratio
from grpo_mega.types import Mean, Metrics


def grpo_loss(
    logprobs: Tensor,
    entropies: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    loss_weights: Tensor,
    sampler_logprobs: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, Metrics]:
    """loss = sum_t loss_weights_t * (kl_coef * k3_t - min(rho_t A_t, clip(rho_t) A_t)), to be minimised; and metrics.

    All tensors are `[n]` float over the trained tokens alone (n = 0 is legal: a zero that still has a gradient),
    log-probs and entropies in nats. old_logprobs None: the old policy is the current one. ref_logprobs may be None if
    kl_coef is 0. Only logprobs need a gradient; entropies are only reported. The loss is a scalar of logprobs' dtype.

    Diff from the paper: a sum, not a mean. The paper's 1/G 1/|o_i| is in loss_weights (w_t * R / D, see `normalization`
    and `Microbatch`), so that the loss adds over microbatches and ranks. Two clip bounds for one: see `surrogate`.

    Metrics are means over tokens, unweighted, detached, float64 totals: clip_fraction; ratio (rho); kl (k3, where a
    reference is given); entropy; logprob; sampler_mismatch, mean |ln pi_old - ln q| with q what was really sampled from
    (0 when the sampler is exact). Raises ConfigError for kl_coef without a reference.
    """
    surrogate, clipped = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low, clip_high)
    token_loss = -surrogate
    old = logprobs if old_logprobs is None else old_logprobs
    values = {
        "clip_fraction": clipped,
        "ratio": importance_ratio(logprobs.detach(), old_logprobs),
        "entropy": entropies,
        "logprob": logprobs,
        "sampler_mismatch": (old.detach() - sampler_logprobs).abs(),
    }
    if ref_logprobs is not None:
        divergence = k3(logprobs, ref_logprobs)
        values["kl"] = divergence
        if kl_coef != 0:
            token_loss = token_loss + kl_coef * divergence
    elif kl_coef != 0:
        raise ConfigError(f"grpo.kl_coef={kl_coef} needs ref_logprobs, which were not computed; or set grpo.kl_coef=0")
    loss = (loss_weights * token_loss).sum()
    return loss, {name: Mean(value.detach().double().sum(), value.numel()) for name, value in values.items()}
