from __future__ import annotations

import time

import pytest

from grpo_mega.config.reward import RegexOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import BoundedError
from grpo_mega.rewards.regex import regex


def value(completion, answer=None, **options):
    return regex(RegexOptions(**options))(completion, answer, {})


@pytest.mark.parametrize(
    ("completion", "match", "reward"),
    [
        ("cat", "fullmatch", 1.0),
        ("a cat", "fullmatch", 0.0),
        ("a cat", "search", 1.0),
        ("CAT", "search", 0.0),
        ("", "search", 0.0),
        ("x" * 10**6 + "cat", "search", 1.0),
        ("\ud800 cat \x00", "search", 1.0),
    ],
)
def test_a_match(completion, match, reward):
    assert value(completion, pattern="cat", match=match) == reward


def test_a_pattern_that_matches_nothing_at_all_is_a_match():
    assert value("", pattern="x*", match="fullmatch") == 1.0


@pytest.mark.parametrize("group", [1, "number"])
@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Answer: 12", "12", 1.0),
        ("Answer: 12", " 12 ", 1.0),
        ("Answer: 1", "12", 0.0),
        ("Answer: 123", "12", 0.0),
        ("12", "12", 0.0),  # not where the pattern looks
        ("Answer: 10 Answer: 11 Answer: 12", "12", 1.0),
        ("Answer: 10 Answer: 11 Answer: 12", "11", 0.0),  # of a list the last one
        ("", "12", 0.0),
    ],
)
def test_a_group_equals_the_answer(completion, answer, reward, group):
    assert value(completion, answer, pattern=r"Answer: (?P<number>\d+)", group=group) == reward


def test_a_group_that_took_no_part():
    assert value("b", "", pattern="(a)?b", group=1) == 0.0
    assert value("12", "12", pattern="[0-9]+", group=0, match="fullmatch") == 1.0


def test_no_answer_for_a_group():
    with pytest.raises(RewardError, match=r"data\.answer_field"):
        value("12", None, pattern="([0-9]+)", group=1)


@pytest.mark.parametrize("match", ["search", "fullmatch"])
def test_backtracking_is_ended_and_the_next_match_is_right(match):
    start = time.monotonic()
    with pytest.raises(BoundedError, match=r"^TimeoutError: no result within its time_limit"):
        value("a" * 60, pattern="(a+)+b", match=match, time_limit=0.2)
    assert time.monotonic() - start < 15
    assert value("aab", pattern="(a+)+b", match=match) == 1.0
