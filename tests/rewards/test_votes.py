"""What counts as correct, and what wrong completions vote for, by each part that reads an answer."""

from __future__ import annotations

import pytest
import reasoning_gym as library

from grpo_mega.config.reward import MathVerifyOptions, PartConfig, RegexOptions
from grpo_mega.rewards import math_verify
from grpo_mega.rewards.votes import Verdict, judge, voter
from grpo_mega.types import Completion, Group, Prompt, Rollout


def part(function, **options):
    return PartConfig(function=function, options=options)


def test_numbers_vote_by_value():
    votes = voter(part("exact"))(["It is 12.", "12.0", "1.2e1", "13", "6/8", "3/4", "none"], "5", {})
    assert votes == ["12", "12", "12", "13", "6/8", "3/4", None]


def test_words_vote_as_they_are_compared():
    votes = voter(part("exact"))(["The answer is Blue.", "well\n**blue**", "green", " \n"], "red", {})
    assert votes == ["blue", "blue", "green", None]
    assert voter(part("exact"))(["so #### 7", "7"], "3 + 3 = 6\n#### 6", {}) == [
        "7",
        "7",
    ]  # GSM8K's reference: a number


def test_mathematics_votes_by_equality():
    texts = [
        r"\boxed{\frac{1}{2}}", "the answer is 0.5", r"thus $x+1$", r"\boxed{1 + x}", r"\boxed{x = 3}", "3", "3.0",
        r"\boxed{x+1}", "nothing here", " ", r"\boxed{0.25}",
    ]  # fmt: skip
    half, sum_, three = r"\frac{1}{2}", "x+1", "x = 3"
    assert voter(part("math_verify", time_limit=5.0))(texts, "7", {}) == [
        half, half, sum_, sum_, three, three, three, sum_, None, None, "0.25",
    ]  # fmt: skip


def test_mathematics_that_takes_too_long_is_equal_to_nothing():
    square, tower = r"\boxed{x^2}", r"\boxed{9^{9^{9^9}}}"
    votes = math_verify.votes(MathVerifyOptions(time_limit=0.3), [square, tower, square, tower])
    assert votes == ["x^2", "9^{9^{9^9}}"] * 2


def test_a_group_of_a_pattern_votes():
    options = RegexOptions(pattern=r"<a>(.*?)</a>", group=1).model_dump()
    assert voter(part("regex", **options))(["<a> x </a>", "<a>y</a><a>x</a>", "<a></a>", "x"], "z", {}) == [
        "x", "x", None, None,
    ]  # fmt: skip


def test_answers_of_reasoning_gym_vote():
    row = library.create_dataset("chain_sum", seed=1, size=1)[0]
    assert voter(part("reasoning_gym"))(["It is 12", "12.0", ""], None, row) == ["12", "12", None]
    row = library.create_dataset("word_sorting", seed=1, size=1)[0]
    votes = voter(part("reasoning_gym"))(["<answer>b, A</answer>", "<answer>B,  a</answer>", "x\nb, c"], None, row)
    assert votes == ["b, A", "b, A", "b, c"]


def rollout(text, *values):
    return Rollout(
        Completion((1,), (0.0,), "stop", text), 0.0, parts=tuple(zip(("right", "tidy"), values, strict=False))
    )


def test_a_verdict_by_hand():
    group = Group(
        Prompt(-1, "q", (1,), "4"),
        (
            rollout("4", 1.0, 0.0),
            rollout("5", 0.0, 1.0),
            rollout("5.0", 0.9, 1.0),  # a part of the reward is no full one
            rollout("6", None, 1.0),  # the part failed: not correct, and no vote
            rollout("7"),  # cut by the length limit, and nobody was asked
            rollout("4", 1.0, None),
        ),
    )
    verdict = judge(group, "right", voter(part("exact")))
    assert verdict == Verdict((True, False, False, False, False, True), (None, "5", "5", None, None, None))
    assert verdict.counts == (2, (2,), 2)
    assert judge(group, "tidy", None).correct == (False, True, True, True, False, False)
    assert judge(group, None, None).counts == (0, (), 6)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So she pays\n#### 72", "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72.\n#### 72"),
        (r"\boxed{1{,}200}", "He earns 3 * 400.\n#### 1,200"),
        (r"Hence $\boxed{\frac{3}{4}}$.", r"We have $4x = 3$, so that $x = \boxed{\frac{3}{4}}$."),
        (r"\boxed{2\sqrt{3}}", r"First $a=\boxed{1}$? No: $a^2 = 12$, so $a = \boxed{\sqrt{12}}$."),
    ],
)
def test_references_that_are_worked_solutions(completion, answer):
    """GSM8K's and MATH's: what the last mark holds is the answer."""
    score = math_verify.math_verify(MathVerifyOptions())
    assert score(completion, answer, {}) == 1.0
    assert score(r"\boxed{5}", answer, {}) == 0.0


def test_a_worked_solutions_number_must_be_carried_out():
    score = math_verify.math_verify(MathVerifyOptions())
    assert score(r"\boxed{9+1}", r"$9+1=\boxed{10}$", {}) == 0.0
    assert score(r"\boxed{10}", r"$9+1=\boxed{10}$", {}) == 1.0
