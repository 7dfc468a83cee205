"""Draws by the inverse CDF, whole and truncated, by hand; cut over ranks they are tested with the log-probs."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.parallel.draw import BLOCK, draw
from grpo_mega.parallel.truncation import CANDIDATES, Truncation, lowest_kept

FP32, FP64 = torch.float32, torch.float64
NAN = float("nan")


def on_a_line(probabilities, uniforms, padded=0, dtype=FP64, temperature=1.0, **truncation):
    """One draw a uniform from the given distribution: tokens, log-probs, near_boundary; kept ids with truncation."""
    weight = torch.tensor([*probabilities, *[NAN] * padded], dtype=dtype).log()[:, None]
    noise = torch.tensor(uniforms, dtype=FP64)
    x = torch.ones(len(noise), 1, dtype=dtype)
    some = Truncation(**truncation) if truncation else None
    drawn = draw(x, weight, noise, vocab_size=len(probabilities), temperature=temperature, truncation=some)
    answer = drawn.tokens, drawn.logprobs, drawn.near_boundary
    if drawn.kept is None:
        return answer
    rows, tokens = drawn.kept
    return *answer, [tokens[rows == row].tolist() for row in range(len(noise))]


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


FOUR = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [3]),
        ({"top_p": 0.41}, [2, 3]),
        ({"top_p": 0.69}, [2, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.5}, [2, 3]),  # 0.4 / 0.9 is not half of what the three hold
        ({"top_k": 3, "top_p": 0.44}, [3]),
        ({"top_k": 2, "top_p": 0.99}, [2, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_what_is_kept_by_hand(truncation, kept, dtype):
    places = [0.0, 0.5, 1 - 2**-53]
    tokens, logprobs, _, sets = on_a_line(FOUR, places, padded=3, dtype=dtype, **truncation)
    assert sets == [kept] * 3
    mass = sum(FOUR[t] for t in kept)
    assert logprobs.tolist() == pytest.approx([math.log(FOUR[t] / mass) for t in tokens], abs=1e-6)
    edges = [sum(FOUR[t] for t in kept[: n + 1]) / mass for n in range(len(kept))]
    assert tokens.tolist() == [kept[sum(edge <= place for edge in edges[:-1])] for place in places]


def test_equal_logits_stay_together():
    """The third largest of (4, 3, 3, 3, 1, 1) / 15 is one of three, none of which has a better claim."""
    probabilities = [1 / 15, 3 / 15, 1 / 15, 3 / 15, 4 / 15, 3 / 15]
    for truncation in ({"top_k": 3}, {"top_p": 0.5}):
        assert on_a_line(probabilities, [0.5], **truncation)[3] == [[1, 3, 4, 5]]


def test_near_boundary_flags_a_threshold_that_rounding_could_move():
    even = [0.25 + 1e-7, 0.25, 0.25 - 1e-7, 0.25 - 2e-7]
    assert on_a_line(even, [0.3], top_k=2)[2].tolist() == [True]  # the next logit is 4e-7 away
    assert on_a_line(FOUR, [0.7], top_k=2)[2].tolist() == [False]
    assert on_a_line(FOUR, [0.7], top_p=0.7 - 1e-6)[2].tolist() == [True]  # the two largest hold 0.7
    assert on_a_line(FOUR, [0.7], top_p=0.7 - 1e-4)[2].tolist() == [False]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_the_nucleus_of_many_tokens_against_sorting(share, dtype):
    """Flat rows have nuclei of more tokens than are sorted first, peaked ones of few."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.01, 0.3, 1.0, 4.0, 20.0])[:, None]
    logits = (torch.randn(5, 4 * CANDIDATES, generator=generator) * scales).to(dtype)
    lowest, _ = lowest_kept(logits, Truncation(top_p=share), None)
    for row, limit in zip(logits, lowest, strict=True):
        values = row.sort(descending=True).values
        mass = torch.softmax(values.double(), dim=0).cumsum(dim=0)
        wanted = int((mass < share).sum()) + 1
        # float32 exponentials have float32's error: one token at the edge may be in or out
        assert abs(int((row >= limit).sum()) - wanted) <= (1 if dtype == FP32 else 0)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_a_long_vocabulary_against_one_cumulative_sum(size):
    """Random draws, and draws at, before and behind the ends of blocks and of the tokens beside them."""
    generator = torch.Generator().manual_seed(size)
    p = torch.rand(size, generator=generator, dtype=FP64) * (torch.rand(size, generator=generator) > 0.3)
    p[-1] += 0.1
    p /= p.sum()
    cdf = p.cumsum(dim=0)
    edges = [cdf[i].item() for b in range(0, size, BLOCK) for i in range(b - 2, b + 2) if 0 <= i < size - 1]
    places = [*torch.rand(300, generator=generator, dtype=FP64).tolist(), *edges]
    places += [edge + off for edge in edges for off in (-1e-12, 1e-12) if 0 <= edge + off < 1]
    tokens, logprobs, _ = on_a_line(p.tolist(), places)
    exact = torch.searchsorted(cdf, torch.tensor(places, dtype=FP64), right=True)
    wrong = (tokens != exact).nonzero().squeeze(1).tolist()
    # exactly on an edge the last bit of a sum decides, between two tokens of some probability
    assert len(wrong) <= len(edges)
    assert all(abs(places[i] - cdf[min(tokens[i], exact[i])].item()) < 1e-14 for i in wrong)
    assert logprobs.tolist() == pytest.approx(p[tokens].log().tolist(), abs=1e-12)
