"""Log-probs, entropies and draws from a cut vocabulary: against log_softmax, by hand, and against one process."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack, contextmanager
from inspect import isfunction
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from grpo_mega.parallel.mesh import initialize, world_size_from_environment
from grpo_mega.parallel.vocab import draw, logprobs_and_entropies

FP32, FP64 = torch.float32, torch.float64
NAN = float("nan")
CUTS = [(2, 259, 136), (3, 259, 88), (3, 5, 4)]  # ranks, vocabulary, rows a rank; the last rank of the last has none


def problem(rows, vocab, padded, dtype=FP64, hidden=6):
    """hidden, weight (rows beyond the vocabulary are nan: whatever touches them shows), targets, two cotangents."""
    generator = torch.Generator().manual_seed(rows + vocab)
    x = torch.randn(rows, hidden, generator=generator, dtype=FP64)
    weight = torch.full((padded, hidden), NAN, dtype=FP64)
    weight[:vocab] = torch.randn(vocab, hidden, generator=generator, dtype=FP64) / 2
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[: min(rows, vocab)] = torch.arange(vocab).flip(0)[:rows]  # the last rank's tokens first
    grads = torch.randn(2, rows, generator=generator, dtype=FP64)
    return x.to(dtype), weight.to(dtype), targets, grads.to(dtype)


def forward_and_backward(x, weight, targets, grads, **options):
    """[log-probs, entropies, gradient of hidden, gradient of weight]."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = logprobs_and_entropies(x, weight, targets, **options)
    return [value.detach() for value in (*found, *torch.autograd.grad(found, (x, weight), tuple(grads)))]


def by_log_softmax(x, weight, targets, grads, vocab, temperature):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = torch.log_softmax(x @ weight[:vocab].t() / temperature, dim=1)
    found = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1)
    return [value.detach() for value in (*found, *torch.autograd.grad(found, (x, weight), tuple(grads)))]


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 11])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk_rows):
    data = problem(11, 13, 16)
    found = forward_and_backward(*data, vocab_size=13, temperature=temperature, chunk_rows=chunk_rows)
    for mine, wanted in zip(found, by_log_softmax(*data, 13, temperature), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert torch.count_nonzero(found[3][13:]) == 0


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_gradcheck_of_both_outputs(temperature):
    x, weight, targets, _ = problem(5, 7, 7)
    weight = torch.cat((weight, torch.full((1, 6), 1e9, dtype=FP64)))  # garbage in a padded row; gradcheck refuses nan

    def both(x, weight):
        return logprobs_and_entropies(x, weight, targets, vocab_size=7, temperature=temperature, chunk_rows=2)

    assert torch.autograd.gradcheck(both, (x.requires_grad_(), weight.requires_grad_()))


def test_by_hand():
    """p = (1/2, 1/4, 1/4): ln p and the entropy 1.5 ln 2; at temperature 1/2, p = (4, 1, 1) / 6."""
    weight = torch.tensor([[2.0], [1.0], [1.0]], dtype=FP64).log()
    x, targets = torch.ones(2, 1, dtype=FP64), torch.tensor([0, 2])
    logprobs, entropies = logprobs_and_entropies(x, weight, targets, vocab_size=3)
    assert logprobs.tolist() == pytest.approx([-math.log(2), -2 * math.log(2)], abs=1e-15)
    assert entropies.tolist() == pytest.approx([1.5 * math.log(2)] * 2, abs=1e-15)
    cold, entropy = logprobs_and_entropies(x, weight, targets, vocab_size=3, temperature=0.5)
    assert cold.tolist() == pytest.approx([math.log(2 / 3), -math.log(6)], abs=1e-15)
    assert entropy[0].item() == pytest.approx(2 / 3 * math.log(1.5) + math.log(6) / 3, abs=1e-15)


def test_logits_of_any_size_stay_finite():
    weight = torch.tensor([[1e4], [0.0], [-1e4]])
    logprobs, entropies = logprobs_and_entropies(torch.ones(3, 1), weight, torch.arange(3), vocab_size=3)
    assert logprobs.tolist() == [0.0, -1e4, -2e4] and entropies.tolist() == [0.0] * 3


def test_no_rows():
    x, weight, targets, grads = problem(0, 7, 8)
    found = forward_and_backward(x, weight, targets, grads, vocab_size=7)
    assert [tuple(value.shape) for value in found] == [(0,), (0,), (0, 6), (8, 6)]
    assert torch.count_nonzero(found[3]) == 0


def test_bf16_inputs_give_fp32_results():
    x, weight, targets, grads = problem(11, 13, 16, torch.bfloat16)
    found = forward_and_backward(x, weight, targets, grads.float(), vocab_size=13)
    assert [value.dtype for value in found] == [FP32, FP32, torch.bfloat16, torch.bfloat16]
    wanted = by_log_softmax(*(v.double() for v in (x, weight)), targets, grads.double(), 13, 1.0)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=0.05)  # products are rounded to 8 bits


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    x, weight, targets, _ = problem(3, 7, 8)
    with pytest.raises(ValueError, match="must be positive"):
        logprobs_and_entropies(x, weight, targets, vocab_size=7, temperature=temperature)


def test_shapes_that_do_not_match_are_refused():
    x, weight, targets, _ = problem(3, 7, 8)
    for bad in ((x[:2], weight, targets), (x[:, :2], weight, targets), (x, weight, targets[:2])):
        with pytest.raises(ValueError, match="hidden"):
            logprobs_and_entropies(*bad, vocab_size=7)


# ---- cut over ranks


def on_ranks(cuts, dtype):
    """Every cut of the vocabulary over this world: results, and what crossed the ranks."""
    mesh = initialize(tensor=world_size_from_environment())
    answers = []
    for ranks, vocab, rows in cuts:
        if ranks != mesh.tensor.size:
            continue
        options = {"vocab_size": vocab, "group": mesh.tensor.group, "temperature": 0.7}
        part = slice(mesh.tensor.rank * rows, (mesh.tensor.rank + 1) * rows)
        with crossings() as crossed:
            x, weight, targets, grads = problem(11, vocab, rows * ranks, dtype)
            found = forward_and_backward(x, weight[part], targets, grads, chunk_rows=4, **options)
        with crossings() as crossed_by_draw:
            x, weight, noise = draws(500, vocab, rows * ranks, dtype)
            drawn = draw(x, weight[part], noise, **options)
        answers.append((found, crossed, drawn, crossed_by_draw))
    return answers


@contextmanager
def crossings():
    """(name, elements of the largest tensor) of every collective of torch.distributed in this block."""
    seen = []
    names = [
        n for n, f in vars(dist).items() if isfunction(f) and re.match("all_|broad|gather|reduce|scatter|i?send", n)
    ]

    def counted(name, function):
        def call(*args, **kwargs):
            seen.append((name, max(a.numel() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))))
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(dist, name, counted(name, getattr(dist, name))))
        yield seen


def draws(rows, vocab, padded, dtype):
    x, weight, _, _ = problem(rows, vocab, padded, dtype)
    return x, weight, torch.rand(rows, generator=torch.Generator().manual_seed(5), dtype=FP64)


def same_bits(values):
    return all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-12), (FP32, 1e-6)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_cut_vocabulary_changes_nothing(ranks, world, dtype, tolerance):
    by_rank = ranks(world, on_ranks, CUTS, dtype)
    cuts = [cut for cut in CUTS if cut[0] == world]
    for n, (_, vocab, rows) in enumerate(cuts):
        answers = [answer[n] for answer in by_rank]
        x, weight, targets, grads = problem(11, vocab, rows * world, dtype)
        wanted = forward_and_backward(x, weight, targets, grads, vocab_size=vocab, temperature=0.7)
        for k in range(3):  # log-probs, entropies and the whole gradient of hidden: on every rank, to the bit
            assert same_bits([found[k] for found, *_ in answers])
        found = [*answers[0][0][:3], torch.cat([answer[0][3] for answer in answers])]
        for mine, dense in zip(found, wanted, strict=True):
            assert (mine - dense).abs().max() <= tolerance * dense.abs().max()
        for _, sent, _, sent_by_draw in answers:  # 11 rows in chunks of 4: four numbers a row; then [11, 6], once
            assert sent == [("all_gather", 16), ("all_gather", 16), ("all_gather", 12), ("all_reduce", 66)]
            assert sent_by_draw == [("all_gather", 2 * 500), ("all_reduce", 3 * 500)]

        x, weight, noise = draws(500, vocab, rows * world, dtype)
        tokens, logprobs, near = draw(x, weight, noise, vocab_size=vocab, temperature=0.7)
        assert len(tokens.unique()) > min(vocab, 60) * 0.9
        for *_, (t, lp, b), _ in answers:
            assert torch.equal(t, tokens) and same_bits([lp, answers[0][2][1]])
            torch.testing.assert_close(lp, logprobs, rtol=0, atol=10 * tolerance)
            assert (b != near).sum() <= 1  # the edge of "near" is itself a rounding matter


# ---- draws in one process


def on_a_line(probabilities, uniforms, padded=0, dtype=FP64, temperature=1.0):
    """One draw a uniform from the given distribution."""
    weight = torch.tensor([*probabilities, *[NAN] * padded], dtype=dtype).log()[:, None]
    noise = torch.tensor(uniforms, dtype=FP64)
    x = torch.ones(len(noise), 1, dtype=dtype)
    return draw(x, weight, noise, vocab_size=len(probabilities), temperature=temperature)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    places = [0.0, 0.05, 0.0999, 0.1001, 0.29, 0.31, 0.5999, 0.6001, 0.99, 1 - 2**-53]
    tokens, logprobs, _ = on_a_line([0.1, 0.2, 0.3, 0.4], places, padded=4)
    assert tokens.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert logprobs.tolist() == pytest.approx([math.log([0.1, 0.2, 0.3, 0.4][t]) for t in tokens], abs=1e-14)


def test_draw_at_a_temperature():
    """(1, 2, 3, 4) / 10 at temperature 1/2 is (1, 4, 9, 16) / 30: log-probs are of the distribution drawn from."""
    tokens, logprobs, _ = on_a_line([0.1, 0.2, 0.3, 0.4], [0.03, 0.04, 0.16, 0.17, 0.46, 0.47], temperature=0.5)
    assert tokens.tolist() == [0, 1, 1, 2, 2, 3]
    assert logprobs.tolist() == pytest.approx([math.log([1, 4, 9, 16][t] / 30) for t in tokens], abs=1e-14)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_what_has_no_probability_is_never_drawn(dtype):
    tokens, _, _ = on_a_line([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 1 - 2**-53], padded=3, dtype=dtype)
    assert tokens.tolist() == [1, 3, 3]


def test_near_boundary_flags_what_rounding_could_decide():
    edges, far, close = [0.1, 0.3, 0.6], 1.01e-5, 0.99e-5
    places = [edge + sign * distance for edge in edges for sign in (-1, 1) for distance in (far, close)]
    tokens, _, near = on_a_line([0.1, 0.2, 0.3, 0.4], [*places, 0.0, 2e-5, 0.45, 1 - 2e-5, 1 - 2**-53])
    assert near.tolist() == [False, True] * 6 + [True, False, False, False, True]
    assert tokens.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0, 2, 3, 3]


def test_frequencies_are_the_probabilities():
    """Pearson's statistic of 20000 draws, 3 degrees of freedom: above 16.3 once in 1000 seeds."""
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=FP64).tolist()
    tokens, _, _ = on_a_line([0.1, 0.2, 0.3, 0.4], noise, dtype=FP32)
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4]) * 20000
    assert ((tokens.bincount(minlength=4) - wanted) ** 2 / wanted).sum() < 16.3
