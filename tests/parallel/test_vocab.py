"""Log-probs and entropies of a cut vocabulary: against log_softmax, by hand, and against one process."""

from __future__ import annotations

import math

import pytest
import torch
from vocabulary import crossings, problem, same_bits, some_kept

from grpo_mega.parallel.draw import draw
from grpo_mega.parallel.mesh import initialize, world_size_from_environment
from grpo_mega.parallel.truncation import Truncation
from grpo_mega.parallel.vocab import logprobs_and_entropies

FP32, FP64 = torch.float32, torch.float64
NAN = float("nan")
TRUNCATIONS = [Truncation(top_k=3), Truncation(top_p=0.9), Truncation(top_k=200, top_p=0.5)]
CUTS = [(2, 259, 136), (3, 259, 88), (3, 5, 4)]  # ranks, vocabulary, rows a rank; the last rank of the last has none


def forward_and_backward(x, weight, targets, grads, **options):
    """[log-probs, entropies, gradient of hidden, gradient of weight]."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = logprobs_and_entropies(x, weight, targets, **options)
    return [value.detach() for value in (*found, *torch.autograd.grad(found, (x, weight), tuple(grads)))]


def by_log_softmax(x, weight, targets, grads, vocab, temperature, kept=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = x @ weight[:vocab].t() / temperature
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if kept is not None:
        left_out[:] = True
        left_out[kept.rows, kept.tokens] = False
    logp = torch.log_softmax(logits.masked_fill(left_out, -torch.inf), dim=1)
    found = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp.masked_fill(left_out, 0.0)).sum(dim=1)
    return [value.detach() for value in (*found, *torch.autograd.grad(found, (x, weight), tuple(grads)))]


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 11])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk_rows):
    data = problem(11, 13, 16)
    found = forward_and_backward(*data, vocab_size=13, temperature=temperature, chunk_rows=chunk_rows)
    for mine, wanted in zip(found, by_log_softmax(*data, 13, temperature), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert torch.count_nonzero(found[3][13:]) == 0


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_a_truncated_policy_is_log_softmax_over_the_kept_tokens(chunk_rows):
    data = problem(11, 13, 16)
    kept = some_kept(data[2], 13)
    found = forward_and_backward(*data, vocab_size=13, temperature=0.7, kept=kept, chunk_rows=chunk_rows)
    for mine, wanted in zip(found, by_log_softmax(*data, 13, 0.7, kept), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert found[0][0] == 0 and found[1][0] == 0  # one token kept: certain


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
    for k in (0, 1):  # the operands are bf16, the logits are not rounded to it
        torch.testing.assert_close(found[k].double(), wanted[k], rtol=0, atol=1e-5)
    for k in (2, 3):
        torch.testing.assert_close(found[k].double(), wanted[k], rtol=2**-8, atol=1e-5)


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
        truncated = forward_and_backward(
            x, weight[part], targets, grads, chunk_rows=4, kept=some_kept(targets, vocab), **options
        )
        with crossings() as crossed_by_draw:
            x, weight, noise = draws(500, vocab, rows * ranks, dtype)
            drawn = [draw(x, weight[part], noise, **options)]
        drawn += [draw(x, weight[part], noise, **options, truncation=some) for some in TRUNCATIONS]
        answers.append((found, truncated, crossed, drawn, crossed_by_draw))
    return answers


def draws(rows, vocab, padded, dtype):
    x, weight, _, _ = problem(rows, vocab, padded, dtype)
    return x, weight, torch.rand(rows, generator=torch.Generator().manual_seed(5), dtype=FP64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-12), (FP32, 1e-6)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_cut_vocabulary_changes_nothing(ranks, world, dtype, tolerance):
    by_rank = ranks(world, on_ranks, CUTS, dtype)
    cuts = [cut for cut in CUTS if cut[0] == world]
    for n, (_, vocab, rows) in enumerate(cuts):
        answers = [answer[n] for answer in by_rank]
        x, weight, targets, grads = problem(11, vocab, rows * world, dtype)
        for which, kept in enumerate((None, some_kept(targets, vocab))):
            wanted = forward_and_backward(x, weight, targets, grads, vocab_size=vocab, temperature=0.7, kept=kept)
            for k in range(3):  # log-probs, entropies and the whole gradient of hidden: on every rank, to the bit
                assert same_bits([answer[which][k] for answer in answers])
            found = [*answers[0][which][:3], torch.cat([answer[which][3] for answer in answers])]
            for mine, dense in zip(found, wanted, strict=True):
                assert (mine - dense).abs().max() <= tolerance * dense.abs().max()
        for _, _, sent, _, sent_by_draw in answers:  # 11 rows in chunks of 4: four numbers a row; then [11, 6], once
            assert sent == [("all_gather", 16), ("all_gather", 16), ("all_gather", 12), ("all_reduce", 66)]
            assert sent_by_draw == [("all_gather", 2 * 500), ("all_reduce", 3 * 500)]

        x, weight, noise = draws(500, vocab, rows * world, dtype)
        for which, some in enumerate((None, *TRUNCATIONS)):
            alone = draw(x, weight, noise, vocab_size=vocab, temperature=0.7, truncation=some)
            assert len(alone.tokens.unique()) > min(vocab, 60) * 0.9
            several = [answer[3][which] for answer in answers]
            for drawn in several:
                assert torch.equal(drawn.tokens, alone.tokens) and same_bits([drawn.logprobs, several[0].logprobs])
                torch.testing.assert_close(drawn.logprobs, alone.logprobs, rtol=0, atol=10 * tolerance)
                assert (drawn.near_boundary != alone.near_boundary).sum() <= 1  # "near" is itself a rounding matter
            if some is not None:
                pairs = torch.cat([torch.stack(drawn.kept, dim=1) for drawn in several]).tolist()
                assert sorted(pairs) == torch.stack(alone.kept, dim=1).tolist()
