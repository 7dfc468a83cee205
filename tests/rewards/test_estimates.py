"""pass@k, maj@k and intervals: by hand, against every subset, and against problems whose truth is known."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from grpo_mega.rewards.estimates import majority_at_k, mean_estimate, pass_at_k, share_estimate, t_quantile


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3, 2) / C(4, 2)
    assert pass_at_k(5, 2, 3) == 0.9  # 1 - C(3, 3) / C(5, 3)
    assert pass_at_k(5, 3, 3) == 1.0  # no three of two wrong ones
    assert pass_at_k(8, 0, 8) == 0.0 and pass_at_k(1, 1, 1) == 1.0
    # one of n is in half of all n/2-subsets: C(20000, 10000) has 6019 digits, far beyond a float
    assert pass_at_k(20_000, 1, 10_000) == 0.5
    assert pass_at_k(10**6, 1, 3) == 3e-6  # 1 - 0.999997 has lost half of its digits


def test_majority_by_hand():
    # of a right, a right, a wrong and a silent one: the six pairs give 1 (both right), 1/2 twice (a tie), 1 twice, 0
    assert majority_at_k(2, (1,), 1, 2) == pytest.approx(4 / 6)
    assert majority_at_k(2, (1,), 1, 3) == 3 / 4  # 1, 1, 1/2, 1/2
    assert majority_at_k(2, (1,), 1, 1) == 2 / 4  # a vote of one is pass@1
    assert majority_at_k(2, (1,), 1, 4) == 1.0
    assert majority_at_k(1, (1, 1), 0, 3) == pytest.approx(1 / 3)  # three answers tie
    assert majority_at_k(3, (2, 2), 0, 7) == 1.0  # a plurality is enough
    assert majority_at_k(2, (3,), 0, 5) == 0.0
    assert majority_at_k(0, (), 4, 2) == 0.0  # nobody votes
    assert majority_at_k(1, (), 3, 4) == 1.0  # one does


def every_subset(correct, others, silent, k):
    ballots = (
        ["right"] * correct + [f"wrong {n}" for n, count in enumerate(others) for _ in range(count)] + [None] * silent
    )
    won = []
    for subset in combinations(ballots, k):
        votes = [vote for vote in subset if vote is not None]
        most = max(map(votes.count, votes), default=0)
        winners = {vote for vote in votes if votes.count(vote) == most}
        won.append(("right" in winners) / len(winners) if winners else 0.0)
    return sum(won) / len(won)


@pytest.mark.parametrize(
    "counts",
    [
        (3, (2, 2), 1),
        (4, (3, 1, 1), 0),
        (2, (2, 2, 2), 2),
        (1, (4, 1), 3),
        (5, (5,), 0),
        (3, (3, 3, 1), 1),
        (0, (2, 1), 5),
    ],
    ids=str,
)
def test_majority_is_the_mean_over_every_subset(counts):
    correct, others, silent = counts
    for k in range(1, correct + sum(others) + silent + 1):
        assert majority_at_k(*counts, k) == pytest.approx(every_subset(*counts, k), abs=1e-12), k


def test_majority_of_many_completions():
    """256 completions have 1e75 64-subsets. With two answers, and k odd, it is the tail of a hypergeometric law."""
    tail = sum(math.comb(140, j) * math.comb(116, 63 - j) for j in range(32, 64)) / math.comb(256, 63)
    assert majority_at_k(140, (116,), 0, 63) == pytest.approx(tail, rel=1e-12)
    assert 0 < majority_at_k(40, (30,) * 3 + (1,) * 126, 0, 64) < 1


def test_a_group_smaller_than_k_is_refused():
    with pytest.raises(ValueError, match=r"^pass@8 of 4 completions: k must be within 1\.\.4; draw more, or lower k$"):
        pass_at_k(4, 1, 8)
    with pytest.raises(ValueError, match=r"^maj@5 of 4 completions: "):
        majority_at_k(2, (1,), 1, 5)
    with pytest.raises(ValueError, match=r"^pass@0 "):
        pass_at_k(4, 1, 0)


def test_students_t_as_in_printed_tables():
    printed = {
        1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 20: 2.086, 30: 2.042, 60: 2.000,
        120: 1.980, 1000: 1.962,
    }  # fmt: skip
    assert {degrees: round(t_quantile(degrees), 3) for degrees in printed} == printed


def test_an_interval_of_a_mean_by_hand():
    found = mean_estimate([1.0, 2.0, 3.0, 6.0])  # s^2 = 14/3, half = 3.182 sqrt(14 / 12)
    assert (found.mean, found.low, found.high) == (
        3.0,
        pytest.approx(-0.4374, abs=1e-4),
        pytest.approx(6.4374, abs=1e-4),
    )
    alone = mean_estimate([0.25])
    assert alone.mean == 0.25 and math.isnan(alone.low) and math.isnan(alone.high)


def test_an_interval_of_a_share_by_hand():
    # p = 1/2, s^2 / N = 1/4, n_eff = 1, t = 12.7062: (81.2238 -+ 80.9734) / 162.4476
    found = share_estimate([0.0, 1.0], 2)
    assert (found.low, found.high) == (pytest.approx(0.00154, abs=1e-5), pytest.approx(0.99846, abs=1e-5))
    none = share_estimate([0.0] * 48, 192)  # t^2 / (N + t^2), t = 2.0117
    assert (none.mean, none.low, none.high) == (0.0, 0.0, pytest.approx(0.07776, abs=1e-5))
    every = share_estimate([1.0] * 48, 192)
    assert (every.mean, every.low, every.high) == (1.0, pytest.approx(1 - 0.07776, abs=1e-5), 1.0)
    assert share_estimate([0.5], 4).low == 0.0 and share_estimate([0.5], 4).high == 1.0  # nothing is known of others
    alike = share_estimate([0.5] * 10, 40)  # no scatter at all: as sure as 40 independent draws, no surer
    assert alike.high - 0.5 == pytest.approx(
        2.2622 * math.sqrt(0.25 / 40 + 2.2622**2 / 6400) / (1 + 2.2622**2 / 40), abs=1e-4
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    """24 problems x 8 completions, problems of Beta(0.4, 1.6) difficulty: mean 0.2, pass@4 = 1 - prod (1.6+i) / (2+i).

    Completions taken for independent draws (192 of them) would give an interval that misses one time in four.
    """
    generator, held, naive, trials = np.random.default_rng(0), {1: 0, 4: 0}, 0, 1000
    truth = {1: 0.2, 4: 1 - math.prod((1.6 + i) / (2 + i) for i in range(4))}
    for correct in generator.binomial(8, generator.beta(0.4, 1.6, size=(trials, 24))).tolist():
        for k, wanted in truth.items():
            found = share_estimate([pass_at_k(8, c, k) for c in correct], 192)
            held[k] += found.low <= wanted <= found.high
        p = sum(correct) / 192
        naive += abs(p - 0.2) <= 1.96 * math.sqrt(p * (1 - p) / 192)
    assert 0.93 < held[1] / trials < 0.98 and 0.93 < held[4] / trials < 0.98, held
    assert naive / trials < 0.8
