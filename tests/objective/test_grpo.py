"""Oracle: DeepSeekMath eq. 3 on three tokens, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.errors import ConfigError
from grpo_mega.objective.grpo import Terms
from grpo_mega.objective.grpo import grpo_loss as loss_of_tokens
from grpo_mega.types import TokenBatch


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def grpo_loss(logprobs: Tensor, entropies: Tensor, **given: Any):
    fields = {key: given.pop(key) for key in TokenBatch.__dataclass_fields__ if key in given}
    return loss_of_tokens(logprobs, entropies, TokenBatch(**fields), Terms(**given))


def three_tokens(**changes: Any) -> dict[str, Any]:
    return {
        "old_logprobs": logs(0.4, 0.8, 0.3),
        "ref_logprobs": logs(0.25, 0.4, 0.6),
        "advantages": torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64),
        "loss_weights": torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64),
        "sampler_logprobs": logs(0.2, 0.8, 0.6),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.04,
    } | changes


ENTROPIES = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)


def test_value_gradient_and_metrics():
    # pi = (.5, .4, .3), rho = (1.25, .5, 1)
    #   surrogate  min(1.25, 1.2) = 1.2 clipped;  min(-.5, -.8) = -.8 clipped;  2
    #   k3         1/2 + ln 2 - 1 = .19314718;    0;                            2 - ln 2 - 1 = .30685282
    # loss = .5 (-1.2 + .04 * .19314718) + .25 (.8 + 0) + .25 (-2 + .04 * .30685282) = -0.8930685281944005
    # d loss / d logprob = w (-rho A where not clipped + .04 (1 - ref/pi)):
    #   .5 * .04 * (1 - .5) = .01;    0;    .25 (-2 + .04 (1 - 2)) = -.51
    logprobs = logs(0.5, 0.4, 0.3).requires_grad_()
    loss, metrics = grpo_loss(logprobs, ENTROPIES, **three_tokens())
    loss.backward()
    assert loss.item() == pytest.approx(-0.8930685281944005, rel=1e-12)
    assert logprobs.grad.tolist() == pytest.approx([0.01, 0.0, -0.51], rel=1e-12, abs=1e-16)
    expected = {
        "clip_fraction": 2 / 3,
        "ratio": 2.75 / 3,
        "kl": 0.5 / 3,  # (.19314718 + 0 + .30685282) / 3
        "entropy": 3.0,
        "logprob": math.log(0.06) / 3,
        "sampler_mismatch": 2 * math.log(2) / 3,  # |ln(.4/.2)|, |ln(.8/.8)|, |ln(.3/.6)|
    }
    assert metrics.keys() == expected.keys()
    for name, mean in metrics.items():
        assert mean.value() == pytest.approx(expected[name], rel=1e-12), name
        assert mean.count == 3
        assert mean.total.dtype == torch.float64 and not mean.total.requires_grad


def test_gradcheck():
    logprobs = logs(0.5, 0.4, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, ENTROPIES, **three_tokens(kl_coef=0.7))[0], logprobs)


def test_first_on_policy_update_is_reinforce_with_a_group_baseline():
    # Two completions of one token each from softmax(logits), rewards 1 and 0, so A = (+1, -1) and w = 1/2 each:
    # REINFORCE ascends sum_i w_i A_i (onehot(o_i) - pi). With pi = (.5, .3, .2), o = (0, 2): the -pi cancel and
    # d loss / d logits = (-1/2, 0, +1/2).
    logits = logs(0.5, 0.3, 0.2).requires_grad_()
    chosen = logits.log_softmax(0)[[0, 2]]
    loss, metrics = grpo_loss(
        chosen,
        torch.zeros(2),
        old_logprobs=None,
        ref_logprobs=None,
        advantages=torch.tensor([1.0, -1.0]).double(),
        loss_weights=torch.tensor([0.5, 0.5]).double(),
        sampler_logprobs=chosen.detach() - 0.25,
        clip_low=1e-12,
        clip_high=1e-12,
        kl_coef=0.0,
    )
    loss.backward()
    assert logits.grad.tolist() == pytest.approx([-0.5, 0.0, 0.5], abs=1e-15)
    assert loss.item() == 0.0  # -(1/2 - 1/2): the value says nothing, the gradient everything
    assert metrics["clip_fraction"].total.item() == 0.0
    assert metrics["ratio"].value() == 1.0
    assert metrics["sampler_mismatch"].value() == pytest.approx(0.25)  # against the current policy
    assert "kl" not in metrics


def test_reference_without_penalty_is_only_reported():
    logprobs = logs(0.5, 0.4, 0.3).requires_grad_()
    with_ref, metrics = grpo_loss(logprobs, ENTROPIES, **three_tokens(kl_coef=0.0))
    without, _ = grpo_loss(logprobs, ENTROPIES, **three_tokens(kl_coef=0.0, ref_logprobs=None))
    assert with_ref.item() == without.item() == pytest.approx(0.5 * -1.2 + 0.25 * 0.8 + 0.25 * -2)
    assert metrics["kl"].value() == pytest.approx(0.5 / 3)


def test_without_penalty_an_infinite_k3_stays_out_of_the_loss():
    logprobs = torch.tensor([-1000.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)  # exp(999) overflows
    loss, metrics = grpo_loss(logprobs, ENTROPIES, **three_tokens(kl_coef=0.0, old_logprobs=None))
    loss.backward()
    assert metrics["kl"].value() == math.inf
    assert logprobs.grad.tolist() == [-0.5, 0.25, -0.5]  # -w A


def test_penalty_without_reference():
    with pytest.raises(ConfigError, match=r"grpo\.kl_coef=0\.04"):
        grpo_loss(logs(0.5, 0.4, 0.3), ENTROPIES, **three_tokens(ref_logprobs=None))


def test_loss_adds_over_microbatches():
    everything = three_tokens()
    logprobs = logs(0.5, 0.4, 0.3)
    whole = grpo_loss(logprobs, ENTROPIES, **everything)[0]
    parts = [
        grpo_loss(
            logprobs[rows],
            ENTROPIES[rows],
            **{key: value[rows] if isinstance(value, Tensor) else value for key, value in everything.items()},
        )[0]
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-14)


@pytest.mark.parametrize("old", [None, torch.zeros(0)])
def test_no_trained_token(old: Tensor | None):
    empty = torch.zeros(0)
    logprobs = torch.zeros(0, requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        empty,
        old_logprobs=old,
        ref_logprobs=empty,
        advantages=empty,
        loss_weights=empty,
        sampler_logprobs=empty,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.04,
    )
    loss.backward()
    assert loss.item() == 0.0 and loss.grad_fn is not None and loss.shape == ()
    assert logprobs.grad.shape == (0,)
    assert all(float(mean.total) == 0.0 and mean.count == 0 for mean in metrics.values())
