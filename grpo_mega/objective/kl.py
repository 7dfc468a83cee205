"""The penalty that keeps the policy near the reference: DeepSeekMath, arXiv:2402.03300, eq. 4."""

from __future__ import annotations

import torch
from torch import Tensor


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref/pi - ln(pi_ref/pi) - 1 = expm1(d) - d with d = ref_logprobs - logprobs; `[n]` nats, never negative.

    logprobs, ref_logprobs `[n]` float, nats. Its mean over tokens drawn from pi is KL(pi || pi_ref): unbiased, and of
    lower variance than -d (J. Schulman, "Approximating KL divergence", 2020: k3).

    Gradient with respect to logprobs: 1 - exp(d). Used as a loss on tokens drawn from pi, as in the paper, the expected
    gradient is therefore that of KL(pi_ref || pi), the other direction: E_pi[(1 - pi_ref/pi) dln pi] = -E_ref[dln pi].

    expm1, where the paper's exp(d) - d - 1 would round at 1: two policies that are 1e-4 nat apart differ by 5e-9, and a
    float32 near 1 has steps of 1.2e-7.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
