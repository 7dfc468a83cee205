"""Oracle: min(rho A, clip(rho, 0.8, 1.3) A), eq. 7 of PPO, at ratios chosen by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.objective.surrogate import clipped_surrogate, importance_ratio

LOW, HIGH = 0.2, 0.3

# pi, pi_old, A -> surrogate, clipped, d surrogate / d logprob (rho A where not clipped, else 0)
CASES = [
    (0.50, 0.25, +1.5, 1.95, True, 0.0),  #   rho 2    > 1.3: min(3, 1.3 * 1.5 = 1.95)
    (0.50, 0.25, -1.5, -3.0, False, -3.0),  # rho 2    > 1.3: min(-3, -1.95)
    (0.25, 0.50, +1.5, 0.75, False, 0.75),  # rho 1/2  < 0.8: min(0.75, 0.8 * 1.5 = 1.2)
    (0.25, 0.50, -1.5, -1.2, True, 0.0),  #   rho 1/2  < 0.8: min(-0.75, -1.2)
    (0.25, 0.20, +2.0, 2.5, False, 2.5),  #   rho 1.25 inside because high is 0.3, not 0.2
    (0.25, 0.20, -2.0, -2.5, False, -2.5),
    (0.21, 0.28, +2.0, 1.5, False, 1.5),  #   rho 0.75 < 0.8, but it pulls back: min(1.5, 1.6)
    (0.21, 0.28, -2.0, -1.6, True, 0.0),  #   min(-1.5, -1.6): outside because low is 0.2, not 0.3
    (0.50, 0.25, 0.0, 0.0, False, 0.0),  #    nothing to learn is not "clipped"
    (0.25, 0.50, 0.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize(("pi", "old", "advantage", "value", "clipped", "slope"), CASES)
def test_value_mask_and_gradient(pi, old, advantage, value, clipped, slope):
    logprobs = torch.tensor([pi], dtype=torch.float64).log().requires_grad_()
    olds, advantages = torch.tensor([old], dtype=torch.float64).log(), torch.tensor([advantage], dtype=torch.float64)
    surrogate, mask = clipped_surrogate(importance_ratio(logprobs, olds), advantages, LOW, HIGH)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert mask.tolist() == [clipped]
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-12, abs=0)  # abs=0: a clipped gradient is exactly 0


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    olds, shift, advantages = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    logprobs = (olds + shift).requires_grad_()
    of = lambda x: clipped_surrogate(importance_ratio(x, olds), advantages, LOW, HIGH)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: of(x)[0], logprobs)
    mask = of(logprobs)[1]
    assert 10 < int(mask.sum()) < 54  # the check saw both branches


def test_old_is_current_by_definition():
    # rho is exactly 1 even where exp(ln p) / p would round, and d(rho A) = A dlogp.
    logprobs = torch.tensor([-0.1, -3.3, -17.7, 0.0]).requires_grad_()
    advantages = torch.tensor([0.7, -1.3, 2.0, -0.1])
    surrogate, mask = clipped_surrogate(importance_ratio(logprobs, None), advantages, LOW, HIGH)
    surrogate.sum().backward()
    assert importance_ratio(logprobs, None).tolist() == [1.0] * 4
    assert surrogate.tolist() == advantages.tolist()
    assert logprobs.grad.tolist() == advantages.tolist()
    assert not mask.any()


def test_ratio_of_probabilities():
    # 0.3 / 0.4 = 0.75
    assert importance_ratio(torch.tensor([math.log(0.3)]), torch.tensor([math.log(0.4)])).item() == pytest.approx(0.75)
