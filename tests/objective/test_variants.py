"""Every term beyond GRPO's own, by hand from its paper's equation: value, gradient, and what it does not touch."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.errors import ConfigError
from grpo_mega.objective import kl
from grpo_mega.objective.correction import off_policy_mask, sampler_correction
from grpo_mega.objective.entropy import EntropyControl
from grpo_mega.objective.grpo import Terms, grpo_loss
from grpo_mega.objective.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    importance_ratio,
    sapo_surrogate,
    sequence_ratio,
    sequence_token_ratio,
)
from grpo_mega.types import Segments, TokenBatch

FP64 = torch.float64


def of(*numbers):
    return torch.tensor(numbers, dtype=FP64)


def logs(*probabilities):
    return of(*probabilities).log()


# two completions of two tokens and of one: ratios 2, 1/2 and 1.5
OLD, NEW = (0.2, 0.4, 0.4), (0.4, 0.2, 0.6)
TWO = Segments(torch.tensor([0, 0, 1]), 2)


def test_sequence_ratio_is_the_geometric_mean():
    # (2 * 1/2)^(1/2) = 1, and 1.5; of [0, 1, 1] with the second ratio 8: (2 * 8)^(1/2) = 4 where tokens are interleaved
    assert sequence_ratio(logs(*NEW), logs(*OLD), TWO).tolist() == pytest.approx([1, 1, 1.5])
    apart = Segments(torch.tensor([1, 0, 1]), 3)  # a segment without a token is none's business
    assert sequence_ratio(logs(0.4, 0.2, 0.8), logs(0.2, 0.4, 0.1), apart).tolist() == pytest.approx([4, 0.5, 4])


def test_gspos_gradient_is_the_mean_log_prob_gradient_times_the_ratio():
    # sum_t (1 / |o|) s A = s A; d/dlogp_t = s A / |o|: here 1 * 3 / 2 twice, and 1.5 * -1
    logprobs = logs(*NEW).requires_grad_()
    weights, advantages = of(1 / 2, 1 / 2, 1), of(3, 3, -1)
    (weights * sequence_ratio(logprobs, logs(*OLD), TWO) * advantages).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1.5, 1.5, -1.5])


def test_gspo_token_has_gspos_value_and_each_tokens_own_gradient():
    # advantages 3 and -1 within one completion: sg[s] A_t / |o| = 1 * 3 / 2 and 1 * -1 / 2
    logprobs = logs(*NEW).requires_grad_()
    ratio = sequence_token_ratio(logprobs, logs(*OLD), TWO)
    assert ratio.tolist() == pytest.approx([1, 1, 1.5])
    (of(1 / 2, 1 / 2, 1) * ratio * of(3, -1, 2)).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1.5, -0.5, 3])


def test_a_sequence_leaves_the_clip_as_a_whole():
    # s = 1.5 > 1.2 with A > 0: no token of the completion learns, though one of its own ratios is 0.75
    logprobs = logs(0.6, 0.3).requires_grad_()
    both = Segments(torch.tensor([0, 0]), 1)
    surrogate, clipped = clipped_surrogate(sequence_ratio(logprobs, logs(0.2, 0.4), both), of(1, 1), 0.2, 0.2)
    assert surrogate.tolist() == pytest.approx([1.2, 1.2]) and clipped.all()
    surrogate.sum().backward()
    assert logprobs.grad.tolist() == [0, 0]


def test_old_is_current_makes_every_ratio_one():
    logprobs = logs(*NEW).requires_grad_()
    for ratio in (sequence_ratio, sequence_token_ratio):
        assert ratio(logprobs, None, TWO).tolist() == [1, 1, 1]


def test_dual_clip_bounds_what_pushes_away():
    # A = -2, c = 3: rho = 5 gives max(min(-10, -2.4), -6) = -6 and no gradient; rho = 2.5 is left at -5; for A > 0 the
    # usual clip: min(5 * 2, 1.2 * 2) = 2.4
    ratio, advantages = of(5, 2.5, 5).requires_grad_(), of(-2, -2, 2)
    surrogate, clipped = clipped_surrogate(ratio, advantages, 0.2, 0.2, dual_clip=3.0)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([-6, -5, 2.4])
    assert clipped.tolist() == [True, False, True] and ratio.grad.tolist() == [0, -2, 0]


def test_cispo_keeps_the_gradient_of_what_it_bounds():
    # sg[min(rho, 1.5)] A ln pi: weights 1.5 (of 2), 0.25 and 1.2; the gradient is weight * A
    logprobs = logs(0.4, 0.1, 0.6).requires_grad_()
    ratio = importance_ratio(logprobs, logs(0.2, 0.4, 0.5))
    surrogate, bounded = cispo_surrogate(ratio, logprobs, of(2, 2, -1), clip_low=1.0, clip_high=0.5)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([3 * math.log(0.4), 0.5 * math.log(0.1), -1.2 * math.log(0.6)])
    assert logprobs.grad.tolist() == pytest.approx([3, 0.5, -1.2]) and bounded.tolist() == [True, False, False]


def test_sapo_by_hand():
    # tau 2 for A > 0, 4 for A < 0. rho = 1 + ln(3) / 2: sigmoid(ln 3) = 3/4, 4/2 * 3/4 = 1.5; slope 4 s (1 - s) = 3/4.
    # rho = 1 - ln(3) / 4: sigmoid(-ln 3) = 1/4, 4/4 * 1/4 = 0.25; slope again 3/4. On policy: value 2 / tau, slope 1
    ratio = of(1 + math.log(3) / 2, 1 - math.log(3) / 4, 1, 1).requires_grad_()
    surrogate = sapo_surrogate(ratio, of(1, -1, 3, -3), tau_positive=2.0, tau_negative=4.0)
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([1.5, -0.25, 3, -1.5])
    assert ratio.grad.tolist() == pytest.approx([0.75, -0.75, 3, -3])


def test_kl_estimators_by_hand():
    # pi = 1/2, ref = 1/4: d = -ln 2. k1 ln 2; k2 (ln 2)^2 / 2; k3 1/2 + ln 2 - 1
    new, ref = logs(0.5).requires_grad_(), logs(0.25)
    ln2 = math.log(2)
    for name, value, slope in (("k1", ln2, 1), ("k2", ln2**2 / 2, ln2), ("k3", ln2 - 0.5, 0.5)):
        found = kl.estimate(name, new, ref)
        (gradient,) = torch.autograd.grad(found.sum(), new)
        assert found.item() == pytest.approx(value) and gradient.item() == pytest.approx(slope), name
    with pytest.raises(ConfigError, match=r"grpo.kl_estimator='k4' is unknown; use one of k1, k2, k3"):
        kl.estimate("k4", new, ref)


def test_what_each_estimator_means_and_where_its_gradient_goes():
    """Exact expectations over three tokens: the table in objective/kl, and that times rho the gradient is KL's own."""
    logits, ref = logs(0.5, 0.3, 0.2).requires_grad_(), logs(0.2, 0.3, 0.5)
    logp = logits.log_softmax(0)
    p, old = logp.exp().detach(), logs(0.4, 0.4, 0.2)
    forward, backward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    (of_kl,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (of_reverse,) = torch.autograd.grad(backward, logits, retain_graph=True)
    assert of_kl.norm() > 0.1 and (of_kl - of_reverse).norm() > 0.05  # they are told apart below
    for name, mean, expected in (
        ("k1", forward.item(), torch.zeros(3, dtype=FP64)),
        ("k2", None, of_kl),
        ("k3", forward.item(), of_reverse),
    ):
        value = (p * kl.estimate(name, logp, ref)).sum()
        assert mean is None or value.item() == pytest.approx(mean, rel=1e-12)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-12), name
    for name in ("k1", "k3"):  # tokens from another policy, times rho: value and gradient of KL(pi || ref)
        value = (old.exp() * importance_ratio(logp, old) * kl.estimate(name, logp, ref)).sum()
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert value.item() == pytest.approx(forward.item(), rel=1e-12)
        assert torch.allclose(gradient, of_kl, atol=1e-12), name


# weights of three tokens: 2, 1/4 and 3; of the sequences 1/2 and 3; geometric means 0.7071 and 3
TRAINER, SAMPLER = logs(0.4, 0.1, 0.6), logs(0.2, 0.4, 0.2)


@pytest.mark.parametrize(
    ("kind", "level", "low", "high", "expected"),
    [
        ("truncate", "token", 0, 2.5, [2, 0.25, 2.5]),  # TIS
        ("truncate", "sequence", 0, 2.5, [0.5, 0.5, 2.5]),
        ("mask", "token", 0.5, 2.5, [2, 0, 0]),  # IcePop
        ("mask", "token", 0.25, 3, [2, 0.25, 3]),  # the bounds belong to it
        ("mask", "sequence", 0, 2.5, [0.5, 0.5, 0]),  # MIS
        ("mask", "geometric", 0.6, 2.5, [0.5**0.5, 0.5**0.5, 0]),
        ("mask", "sequence", 0.6, 4, [0, 0, 3]),
    ],
)
def test_corrections_by_hand(kind, level, low, high, expected):
    old = TRAINER.clone().requires_grad_()
    found = sampler_correction(old, SAMPLER, kind, level, low * (1 - 1e-12), high * (1 + 1e-12), TWO)
    assert found.tolist() == pytest.approx(expected) and not found.requires_grad


def test_off_policy_sequences_are_masked_where_the_advantage_is_negative():
    # drift of the first completion (ln(.2/.4) + ln(.4/.1)) / 2 = ln(2) / 2 = 0.3466, of the second ln(.2/.6) < 0
    drift = math.log(2) / 2
    for threshold, advantages, expected in (
        (drift * 0.99, of(-1, -1, -1), [0, 0, 1]),
        (drift * 1.01, of(-1, -1, -1), [1, 1, 1]),
        (drift * 0.99, of(1, 1, -1), [1, 1, 1]),
        (drift * 0.99, of(1, -1, -1), [1, 0, 1]),  # of process supervision: the tokens that push away
    ):
        assert off_policy_mask(TRAINER, SAMPLER, advantages, threshold, TWO).tolist() == expected


def test_entropy_control_follows_its_target():
    control = EntropyControl(0.0, target=0.5, delta=0.25)
    control = control.after(0.4)  # below: up, and in use
    assert (control.coef, control.in_loss) == (0.25, 0.25)
    control = control.after(0.3)
    assert (control.coef, control.in_loss) == (0.5, 0.5)
    control = control.after(0.6)  # above: down, and out of the loss
    assert (control.coef, control.in_loss) == (0.25, 0.0)
    assert control.after(9.0).after(9.0).coef == 0.0  # never a penalty


def tokens(**more):
    return TokenBatch(
        **{
            "loss_weights": of(0.5, 0.5, 1),
            "advantages": of(2, 2, -1),
            "sampler_logprobs": SAMPLER,
            "old_logprobs": logs(*OLD),
            "ref_logprobs": None,
            "segments": TWO,
        }
        | more
    )


def loss(terms, **more):
    logprobs, entropies = logs(*NEW).requires_grad_(), of(1, 2, 3).requires_grad_()
    value, metrics = grpo_loss(logprobs, entropies, tokens(**more), Terms(**({"kl_coef": 0.0} | terms)))
    slopes = torch.autograd.grad(value, (logprobs, entropies), allow_unused=True)
    return value.item(), slopes[0].tolist(), slopes[1], {name: mean.value() for name, mean in metrics.items()}


def test_the_terms_together_by_hand():
    # ratios 2, 1/2, 1.5; w A = 1, 1, -1. clip(.2, .2): -(min(4, 2.4) / 2 + min(1, 1.6) / 2 + min(-1.5, -1.2)) = -0.2
    value, slope, of_entropy, _ = loss({})
    assert value == pytest.approx(-(1.2 + 0.5 - 1.5)) and slope == pytest.approx([0, -0.5, 1.5]) and of_entropy is None
    # the bonus: - 0.1 * (0.5 * 1 + 0.5 * 2 + 3)
    value, slope, of_entropy, _ = loss({"entropy_coef": 0.1})
    assert value == pytest.approx(-0.2 - 0.45) and of_entropy.tolist() == pytest.approx([-0.05, -0.05, -0.1])
    # maximum likelihood: -(ln .4 + ln .2 - ln .6)
    value, slope, _, metrics = loss({"surrogate": "logprob"})
    assert value == pytest.approx(-(math.log(0.4) + math.log(0.2) - math.log(0.6)))
    assert slope == pytest.approx([-1, -1, 1]) and metrics["clip_fraction"] == 0
    # a mask by sequence, weights .5 * .5 and 1.5 (old / sampler: 1, 1 -> prod 1; 2)
    value, slope, _, metrics = loss({"correction": "mask", "correction_level": "sequence", "correction_high": 1.5})
    assert value == pytest.approx(-1.7) and slope == pytest.approx([0, -0.5, 0])
    assert metrics["correction_weight"] == pytest.approx(2 / 3)
    # unbiased k3 against ref = old: rho (1/rho + ln rho - 1), of each token; its slope is rho ln rho
    value, slope, _, metrics = loss(
        {"kl_coef": 1.0, "kl_unbiased": True, "surrogate": "logprob"},
        ref_logprobs=logs(*OLD),
        advantages=of(0, 0, 0),
    )
    parts = [rho * (1 / rho + math.log(rho) - 1) for rho in (2, 0.5, 1.5)]
    assert value == pytest.approx(0.5 * parts[0] + 0.5 * parts[1] + parts[2])
    assert slope == pytest.approx([math.log(2), -0.25 * math.log(2), 1.5 * math.log(1.5)])
    assert metrics["kl"] == pytest.approx(sum(part / rho for part, rho in zip(parts, (2, 0.5, 1.5), strict=True)) / 3)


def test_sequence_terms_without_sequences_are_refused():
    for terms in ({"ratio": "sequence"}, {"correction": "mask", "correction_level": "geometric"}):
        assert Terms(**terms).needs_sequences
        with pytest.raises(ValueError, match="needs the tokens' sequences"):
            loss(terms, segments=None)
    with pytest.raises(ValueError, match="needs the tokens' sequences"):
        loss({"off_policy_threshold": 0.1}, segments=None)
    assert not Terms(correction="mask").needs_sequences and Terms(off_policy_threshold=0.1).needs_sequences


ALL_TERMS = {
    "gspo": {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "gspo_token": {"ratio": "sequence_token", "clip_low": 0.3, "clip_high": 0.4},
    "dual clip": {"dual_clip": 1.3},
    "sapo": {"surrogate": "sapo", "tau_positive": 1.0, "tau_negative": 2.0},
    "kl k2": {"kl_estimator": "k2", "kl_coef": 0.3},
    "kl unbiased": {"kl_unbiased": True, "kl_coef": 0.3},
    "kl k1 unbiased": {"kl_estimator": "k1", "kl_unbiased": True, "kl_coef": 0.3},
    "log-prob": {"surrogate": "logprob"},
    "entropy": {"entropy_coef": 0.2},
}


@pytest.mark.parametrize("name", ALL_TERMS)
def test_gradcheck(name):
    """Where the objective is a function of its inputs; sg[] makes gspo_token's and cispo's gradients another one's."""
    generator = torch.Generator().manual_seed(3)
    old, ref, sampler, advantages, weights, shift = torch.randn(6, 12, generator=generator, dtype=FP64)
    batch = TokenBatch(weights.abs(), advantages, sampler, old, ref, Segments(torch.tensor([0, 2, 2, 1] * 3), 3))
    terms = Terms(**({"kl_coef": 0.0} | ALL_TERMS[name]))
    inputs = (old + 0.3 * shift).requires_grad_(), shift.abs().requires_grad_()
    if name == "gspo_token":  # with one advantage a completion it has GSPO's gradient
        one = batch.segments.means(advantages)
        alike = [TokenBatch(batch.segments.means(batch.loss_weights), one, sampler, old, ref, batch.segments)] * 2
        kinds = (
            terms,
            Terms(
                **(
                    {"kl_coef": 0.0, "ratio": "sequence"}
                    | {k: 0.3 + 0.1 * (k == "clip_high") for k in ("clip_low", "clip_high")}
                )
            ),
        )
        found = [
            torch.autograd.grad(grpo_loss(*inputs, b, t)[0], inputs[0])[0] for b, t in zip(alike, kinds, strict=True)
        ]
        assert found[0].norm() > 0.1 and torch.allclose(*found, atol=1e-12)
        return
    assert torch.autograd.gradcheck(lambda *given: grpo_loss(*given, batch, terms)[0], inputs)
