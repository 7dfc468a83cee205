"""What n completions of each of N problems say about a model: pass@k, maj@k, means, and how sure that is.

A problem's value is the expectation over all its k-subsets, exactly: drawing k completions once, or one k-subset of n,
would have the same mean and more noise. Problems are what was sampled; completions of one problem are alike, and an
interval that took them for independent would be too narrow (Miller, arXiv:2411.00640, section 2.2). So every interval
comes from the scatter of the problems' values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its 95 % interval; nan where one problem says nothing about the others."""

    mean: float
    low: float
    high: float


def pass_at_k(total: int, correct: int, k: int) -> float:
    """The probability that a k-subset of `total` completions, `correct` of them correct, holds a correct one.

    1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374, equation 1). In integers up to one division, which Python
    rounds correctly: their product of floats loses digits where the result is small, and factorials overflow.
    Raises ValueError for a k that is not within 1..total.
    """
    _check(total, k, "pass")
    subsets = math.comb(total, k)
    return (subsets - math.comb(total - correct, k)) / subsets


@lru_cache(maxsize=4096)
def majority_at_k(correct: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """The expected correctness of a majority vote (self-consistency, arXiv:2203.11171) over a k-subset of completions.

    correct: completions with the right answer, which all vote for it. others: how many have each of the wrong answers.
    silent: completions without an answer; they are drawn and do not vote. An answer wins that has the most votes; among
    m such each wins with probability 1/m (the paper leaves ties open). A subset without a vote is not correct.

    Sum over j of P(the right answer has j votes) * E[1 / (1 + wrong answers with j votes); none with more], counted in
    integers: a wrong answer with c completions has i <= j votes in C(c, i) ways; those with c < j, and the silent
    ones, cannot win, and fill the subset in C(rest, .) ways. Polynomial in n, though there are C(n, k) subsets.
    Raises ValueError for a k that is not within 1..n.
    """
    total = correct + sum(others) + silent
    _check(total, k, "maj")
    won = Fraction(0)
    for votes in range(1, min(correct, k) + 1):
        left = k - votes
        harmless = silent + sum(count for count in others if count < votes)
        ways = {(0, 0): 1}  # (completions taken from rivals, rivals that have as many votes) -> in how many ways
        for count in (count for count in others if count >= votes):
            more: dict[tuple[int, int], int] = defaultdict(int)
            for (taken, ties), number in ways.items():
                for i in range(min(votes, left - taken) + 1):
                    more[taken + i, ties + (i == votes)] += number * math.comb(count, i)
            ways = more
        share = sum(
            Fraction(number * math.comb(harmless, left - taken), 1 + ties) for (taken, ties), number in ways.items()
        )
        won += math.comb(correct, votes) * share
    return float(won / math.comb(total, k))


def _check(total: int, k: int, name: str) -> None:
    if not 1 <= k <= total:
        raise ValueError(f"{name}@{k} of {total} completions: k must be within 1..{total}; draw more, or lower k")


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of the problems' values, of any size: mean -+ t s / sqrt(N), t Student's of N - 1 degrees."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * math.sqrt(_variance(values, mean))
    return Estimate(mean, mean - half, mean + half)


def share_estimate(values: Sequence[float], draws: int) -> Estimate:
    """The mean of the problems' values, each within 0..1: a probability, with an interval that stays in 0..1.

    Wilson's interval (1927) with the effective number of draws in place of n and Student's t of N - 1 degrees in place
    of z (as for cluster samples: Dean and Pagano, J. Survey Statistics and Methodology 3, 2015):

        n_eff = p (1 - p) / (s^2 / N), at most `draws`, the completions of all problems
        (p + t^2 / 2n -+ t sqrt(p (1 - p) / n + t^2 / 4n^2)) / (1 + t^2 / n), n = n_eff

    The plain p -+ t s / sqrt(N) has no width where all problems agree, and leaves 0..1 near its ends. Where every value
    is 0, or every one is 1, nothing is known of how alike completions of a problem are, and n_eff is N.
    """
    count = len(values)
    p = min(max(math.fsum(values) / count, 0.0), 1.0)
    if count == 1:
        return Estimate(p, 0.0, 1.0)
    variance, scatter = _variance(values, p), p * (1 - p)
    n = min(scatter / variance, draws) if variance > 0 else (draws if scatter else count)
    t2 = t_quantile(count - 1) ** 2
    middle, half = p + t2 / (2 * n), math.sqrt(t2 * (scatter / n + t2 / (4 * n * n)))
    low, high = ((middle + side * half) / (1 + t2 / n) for side in (-1, 1))
    return Estimate(p, min(max(low, 0.0), p), max(min(high, 1.0), p))


def _variance(values: Sequence[float], mean: float) -> float:
    """Of the mean of independent values: s^2 / N."""
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


@lru_cache(maxsize=64)
def t_quantile(degrees: int) -> float:
    """The t that Student's |T| with that many degrees of freedom stays below with probability CONFIDENCE."""
    low, high = 1.0, 16.0  # 12.7 for one degree, 1.96 for infinitely many
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| < t): the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cos2, odd = math.cos(angle) ** 2, degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + odd, degrees, 2):  # cos^i's coefficient: (i - 1) / i of the one before
        term *= cos2 * (i - 1) / i
        total += term
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
