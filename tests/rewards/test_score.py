from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from grpo_mega.rewards.score import score_group
from grpo_mega.types import Completion, Group, Prompt

PROMPT = Prompt(index=3, text="7 + 5 =", token_ids=(1, 2), answer="12", row={"level": 2})


def completion(text: str, reason: Any = "stop") -> Completion:
    return Completion(token_ids=(5, 6), sampler_logprobs=(-1.0, -2.0), finish_reason=reason, text=text)


def score(completions: list[Completion], reward: Any, truncated: Any = "reward") -> Group:
    return score_group(PROMPT, completions, reward, truncated=truncated, truncation_reward=-0.5)


def outcomes(group: Group) -> list[tuple[float, str | None, bool]]:
    return [(rollout.reward, rollout.error, rollout.counts) for rollout in group.rollouts]


def test_the_function_gets_text_answer_and_row_and_order_is_kept():
    calls = []

    def reward(text: str, answer: str | None, row: Any) -> float:
        calls.append((text, answer, row))
        return len(text) / 4

    completions = [completion("abc"), completion(""), completion("ab")]
    group = score(completions, reward)
    assert calls == [("abc", "12", {"level": 2}), ("", "12", {"level": 2}), ("ab", "12", {"level": 2})]
    assert group.prompt is PROMPT
    assert [rollout.completion for rollout in group.rollouts] == completions
    assert outcomes(group) == [(0.75, None, True), (0.0, None, True), (0.5, None, True)]


@pytest.mark.parametrize(
    ("result", "value"), [(1, 1.0), (True, 1.0), (-0.25, -0.25), (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5)]
)
def test_numbers_of_any_kind(result: Any, value: float):
    (rollout,) = score([completion("x")], lambda *_: result).rollouts
    assert (rollout.reward, rollout.error) == (value, None)
    assert type(rollout.reward) is float


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def raising(error: BaseException) -> Any:
    def reward(*_: Any) -> float:
        raise error

    return reward


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        (raising(ValueError("bad\n  thing")), "ValueError: bad thing"),
        (raising(ValueError("x" * 10**6)), "ValueError: " + "x" * 188),
        (raising(KeyError()), "KeyError: "),
        (raising(SystemExit(2)), "SystemExit: 2"),
        (raising(RecursionError("deep")), "RecursionError: deep"),
        (raising(Mute()), "Mute: (its message cannot be shown)"),
        (lambda *_: math.nan, "ValueError: the reward function returned nan, not a finite number"),
        (lambda *_: -math.inf, "ValueError: the reward function returned -inf, not a finite number"),
        (lambda *_: None, "TypeError: the reward function returned NoneType, not a number"),
        (lambda *_: "1.0", "TypeError: the reward function returned str, not a number"),
        (lambda *_: 10**400, "OverflowError: int too large to convert to float"),
    ],
)
def test_a_fault_costs_that_completion_alone(reward: Any, error: str):
    def on_second(text: str, answer: str | None, row: Any) -> float:
        return reward(text, answer, row) if text == "second" else 1.0

    group = score([completion("first"), completion("second"), completion("third")], on_second)
    assert outcomes(group) == [(1.0, None, True), (0.0, error, True), (1.0, None, True)]
    assert len(error) <= 200


def test_an_interrupt_is_no_fault():
    with pytest.raises(KeyboardInterrupt):
        score([completion("x")], raising(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("truncated", "called", "cut"),
    [
        ("reward", ["whole", "cut"], (1.0, None, True)),
        ("mask", ["whole", "cut"], (1.0, None, False)),
        ("penalize", ["whole"], (-0.5, None, True)),
    ],
)
def test_completions_cut_by_the_length_limit(truncated: str, called: list[str], cut: tuple[float, None, bool]):
    texts = []

    def reward(text: str, answer: str | None, row: Any) -> float:
        texts.append(text)
        return 1.0

    group = score([completion("whole"), completion("cut", "length")], reward, truncated)
    assert texts == called
    assert outcomes(group) == [(1.0, None, True), cut]


def test_a_masked_completion_whose_reward_raises():
    group = score([completion("cut", "length")], raising(ValueError("no")), "mask")
    assert outcomes(group) == [(0.0, "ValueError: no", False)]
