"""The penalty that keeps the policy near the reference, from sampled tokens: k1, k2, k3 and their unbiased gradients.

With d = ln pi_ref(o_t) - ln pi(o_t) and o_t drawn from pi (J. Schulman, "Approximating KL divergence", 2020):

    name   value           mean over pi        gradient, as a loss on tokens that are drawn, in expectation
    k1     -d              KL(pi || ref)       0: E[dln pi] vanishes, so that it penalises nothing
    k2     d^2 / 2         not KL, but near    that of KL(pi || ref): E[-d dln pi]
    k3     exp(d) - 1 - d  KL(pi || ref)       that of KL(ref || pi), the other direction: E[(1 - exp d) dln pi]

Each value times rho = pi / pi_old with the gradient through both factors has, on tokens drawn from pi_old, the mean of
the value under pi and the gradient of that mean: for k1 and k3 the gradient of KL(pi || ref), exactly. For k3 this is
DeepSeek-V3.2's form (arXiv:2512.02556, section 3.1). In the reward, the value alone matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_mega.errors import ConfigError

ESTIMATORS = ("k1", "k2", "k3")


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ln(pi / pi_ref), `[n]` nats: unbiased, of either sign, and of the largest variance of the three."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(ln(pi / pi_ref))^2 / 2, `[n]`: never negative, biased where the policies are far apart."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref/pi - ln(pi_ref/pi) - 1 = expm1(d) - d; `[n]` nats, never negative: DeepSeekMath, arXiv:2402.03300, eq. 4.

    logprobs, ref_logprobs `[n]` float, nats. Gradient with respect to logprobs: 1 - exp(d).

    expm1, where the paper's exp(d) - d - 1 would round at 1: two policies that are 1e-4 nat apart differ by 5e-9, and a
    float32 near 1 has steps of 1.2e-7.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def estimate(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator of that name, `[n]`. Raises ConfigError for an unknown one."""
    if name not in ESTIMATORS:
        raise ConfigError(f"grpo.kl_estimator={name!r} is unknown; use one of {', '.join(ESTIMATORS)}")
    return {"k1": k1, "k2": k2, "k3": k3}[name](logprobs, ref_logprobs)
