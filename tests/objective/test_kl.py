"""Oracle: DeepSeekMath eq. 4, pi_ref/pi - ln(pi_ref/pi) - 1, at ratios whose logarithm is known."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.objective.kl import k3


@pytest.mark.parametrize(
    ("pi", "ref", "value", "slope"),
    [
        (0.5, 0.25, 0.1931471805599453, 0.5),  #   1/2 + ln 2 - 1;       1 - 1/2
        (0.3, 0.6, 0.3068528194400547, -1.0),  #   2 - ln 2 - 1;         1 - 2
        (0.4, 0.6, 0.09453489189183562, -0.5),  #  1.5 - ln 1.5 - 1;     1 - 1.5
        (0.4, 0.4, 0.0, 0.0),
    ],
)
def test_value_and_gradient(pi, ref, value, slope):
    logprobs = torch.tensor([pi], dtype=torch.float64).log().requires_grad_()
    penalty = k3(logprobs, torch.tensor([ref], dtype=torch.float64).log())
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(value, rel=1e-12)
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-12)


def test_gradcheck():
    logprobs, refs = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(k3, (logprobs.requires_grad_(), refs.requires_grad_()))


def test_small_differences_survive_float32():
    # d = 1e-4: exp(d) - d - 1 = 5.000167e-9, far below float32's step of 1.2e-7 at 1 (as written it comes out wrong).
    difference = torch.tensor([1e-4, -1e-4])
    expected = torch.tensor([5.000166670833417e-9, 4.999833337500083e-9])
    torch.testing.assert_close(k3(torch.zeros(2), difference), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_negative(dtype: torch.dtype):
    size = torch.logspace(-30, 1, 100_000, dtype=torch.float64).to(dtype)
    for difference in (size, -size):
        assert k3(torch.zeros_like(difference), difference).min() >= 0


def test_expectation_is_kl_and_its_expected_gradient_is_the_other_kl():
    # pi = (.5, .3, .2), ref = (.25, .6, .15): KL(pi || ref) = .5 ln 2 - .3 ln 2 + .2 ln(4/3) = 0.19616585060234524.
    # As a loss on tokens drawn from pi: d/dlogit_j = sum_v pi_v (1 - ref_v / pi_v) (1[v = j] - pi_j) = pi_j - ref_j,
    # which is the gradient of KL(ref || pi), not of KL(pi || ref).
    pi, ref = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.6, 0.15]], dtype=torch.float64)
    logits = pi.log().requires_grad_()
    penalty = k3(logits.log_softmax(0), ref.log())
    (pi * penalty).sum().backward()
    assert (pi * penalty).sum().item() == pytest.approx(0.2 * math.log(2) + 0.2 * math.log(4 / 3), rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor([0.25, -0.3, 0.05], dtype=torch.float64))
