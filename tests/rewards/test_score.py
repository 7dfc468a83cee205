from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from grpo_mega.errors import RewardError
from grpo_mega.rewards.resolve import Part
from grpo_mega.rewards.score import UNSCORED_STEPS, first_fault, score_groups, unscored_steps
from grpo_mega.rewards.steps import Marks
from grpo_mega.types import Completion, Group, Prompt, Rollout

PROMPT = Prompt(index=3, text="7 + 5 =", token_ids=(1, 2), answer="12", row={"level": 2})


def completion(text: str, reason: Any = "stop") -> Completion:
    return Completion(token_ids=(5, 6), sampler_logprobs=(-1.0, -2.0), finish_reason=reason, text=text)


def score(completions: list[Completion], reward: Any, truncated: Any = "reward") -> Group:
    """With one part, which is called `own`, or with the parts given."""
    parts = reward if isinstance(reward, list) else [Part("own", 1.0, reward)]
    (group,) = score_groups([PROMPT], [completions], parts, truncated=truncated, truncation_reward=-0.5)
    return group


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
    assert outcomes(group) == [(1.0, None, True), (0.0, f"own: {error}"[:200], True), (1.0, None, True)]
    assert [rollout.parts for rollout in group.rollouts] == [(("own", 1.0),), (("own", None),), (("own", 1.0),)]


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
    assert outcomes(group) == [(0.0, "own: ValueError: no", False)]


# ---- several parts


def length(text: str, answer: str | None, row: Any, *, token_ids: Any) -> float:
    return -float(len(token_ids))


def test_parts_are_weighted_added_and_kept_apart():
    parts = [
        Part("right", 2.0, lambda text, answer, row: float(text == answer)),
        Part("short", 0.25, length, extras=("token_ids",)),
        Part("watched", 0.0, lambda text, answer, row: 7),
    ]
    group = score([completion("12"), completion("13")], parts)
    assert outcomes(group) == [(1.5, None, True), (-0.5, None, True)]  # 2 * 1 - 2 / 4, 2 * 0 - 2 / 4
    assert group.rollouts[0].parts == (("right", 1.0), ("short", -2.0), ("watched", 7.0))


def test_the_part_that_failed_is_named_and_the_others_are_kept():
    parts = [
        Part("right", 1.0, lambda text, answer, row: 1.0),
        Part("judge", 0.0, raising(ConnectionError("refused"))),  # of weight 0: a fault all the same
        Part("odd", 1.0, lambda text, answer, row: math.nan),
    ]
    (rollout,) = score([completion("12")], parts).rollouts
    assert rollout.reward == 0.0
    assert rollout.error == (
        "judge: ConnectionError: refused; odd: ValueError: the reward function returned nan, not a finite number"
    )
    assert rollout.parts == (("right", 1.0), ("judge", None), ("odd", None))


def test_a_sum_beyond_numbers():
    parts = [Part(name, 1e200, lambda text, answer, row: 1e200) for name in "ab"]
    (rollout,) = score([completion("12")], parts).rollouts
    assert (rollout.reward, rollout.parts) == (0.0, (("a", 1e200), ("b", 1e200)))
    assert rollout.error == "ValueError: the weighted sum of {'a': 1e+200, 'b': 1e+200} is inf, not a finite number"


def test_a_function_gets_the_keywords_that_it_asks_for():
    seen = []

    def reward(text: str, answer: str | None, row: Any, *, token_ids: Any, finish_reason: str) -> float:
        seen.append((text, token_ids, finish_reason))
        return 0.0

    score(
        [completion("a"), completion("b", "length")], [Part("own", 1.0, reward, extras=("token_ids", "finish_reason"))]
    )
    assert seen == [("a", (5, 6), "stop"), ("b", (5, 6), "length")]


# ---- batch functions

SECOND = Prompt(index=4, text="1 + 1 =", token_ids=(3,), answer=None, row={"level": 1})


def batch(function: Any, texts: list[list[str]], truncated: Any = "reward", cut: str = "", **more: Any) -> list[Group]:
    """Scores texts[k] for PROMPT and SECOND; a text equal to `cut` was cut by the length limit."""
    completions = [[completion(text, "length" if text == cut else "stop") for text in several] for several in texts]
    parts = [Part("judge", 2.0, function, batch=True, **more)]
    return score_groups([PROMPT, SECOND], completions, parts, truncated=truncated, truncation_reward=-0.5)


def test_a_batch_function_is_called_once_with_all_completions_of_all_prompts():
    calls = []

    def judge(texts: list[str], answers: list[Any], rows: list[Any], *, token_ids: list[Any]) -> Any:
        calls.append((texts, answers, rows, token_ids))
        return np.arange(len(texts), dtype=np.float32)

    groups = batch(judge, [["a", "b"], ["c", "d"]], extras=("token_ids",))
    assert calls == [
        (["a", "b", "c", "d"], ["12", "12", None, None], [{"level": 2}] * 2 + [{"level": 1}] * 2, [(5, 6)] * 4)
    ]
    assert [group.prompt for group in groups] == [PROMPT, SECOND]
    assert [[rollout.reward for rollout in group.rollouts] for group in groups] == [[0.0, 2.0], [4.0, 6.0]]


def test_a_batch_function_is_not_asked_about_penalized_completions():
    calls = []

    def judge(texts: list[str], answers: list[Any], rows: list[Any]) -> list[float]:
        calls.append(texts)
        return [1.0] * len(texts)

    groups = batch(judge, [["a", "cut"], ["cut", "d"]], "penalize", "cut")
    assert calls == [["a", "d"]]
    assert [outcomes(group) for group in groups] == [
        [(2.0, None, True), (-0.5, None, True)],
        [(-0.5, None, True), (2.0, None, True)],
    ]
    assert groups[0].rollouts[1].parts == ()
    assert [outcomes(group) for group in batch(judge, [["cut"], ["cut"]], "penalize", "cut")] == [
        [(-0.5, None, True)]
    ] * 2
    assert len(calls) == 1  # nothing was left to ask


def test_one_bad_number_of_a_batch_costs_one_completion():
    groups = batch(lambda *_: [1.0, math.inf, None, 0.5], [["a", "b"], ["c", "d"]])
    assert [outcome for group in groups for outcome in outcomes(group)] == [
        (2.0, None, True),
        (0.0, "judge: ValueError: the reward function returned inf, not a finite number", True),
        (0.0, "judge: TypeError: the reward function returned NoneType, not a number", True),
        (1.0, None, True),
    ]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (raising(TimeoutError("no judge")), "TimeoutError: no judge"),
        (raising(SystemExit(1)), "SystemExit: 1"),
        (lambda *_: [1.0] * 3, "ValueError: the batch function returned 3 results for 4 completions"),
        (lambda *_: [], "ValueError: the batch function returned 0 results for 4 completions"),
        (lambda *_: 1.0, "TypeError: 'float' object is not iterable"),
        (lambda *_: None, "TypeError: 'NoneType' object is not iterable"),
        (lambda *_: "1111", "TypeError: the batch function returned str, not a list of numbers"),
        (lambda *_: dict.fromkeys(range(4), 1.0), "TypeError: the batch function returned dict, not a list of numbers"),
        (lambda *_: {1.0, 2.0, 3.0, 4.0}, "TypeError: the batch function returned set, not a list of numbers"),
    ],
)
def test_a_failed_batch_costs_all_its_completions(function: Any, error: str):
    groups = batch(function, [["a", "b"], ["c", "d"]])
    assert [outcome for group in groups for outcome in outcomes(group)] == [(0.0, f"judge: {error}", True)] * 4


# ---- a reward that is down


def group_of(*errors: str | None) -> Group:
    return Group(PROMPT, tuple(Rollout(completion("x"), 0.0, error) for error in errors))


def test_a_run_ends_when_nothing_is_scored_for_some_steps():
    down, partly = [group_of("judge: E: 1", "judge: E: 2")] * 2, [group_of("judge: E: 1"), group_of(None)]
    assert UNSCORED_STEPS == 3
    assert unscored_steps(partly, 0) == unscored_steps(partly, 2) == 0
    assert (unscored_steps(down, 0), unscored_steps(down, 1)) == (1, 2)
    with pytest.raises(RewardError) as caught:
        unscored_steps(down, 2)
    assert str(caught.value) == (
        "the reward failed for every completion of 3 steps in a row, first at prompt 3, completion 0: judge: E: 1; "
        "mend the function and start again: the run goes on from its latest checkpoint"
    )


def test_the_first_fault():
    assert (
        first_fault([group_of(None, None), group_of(None, "a: E: x", "b")])
        == "first at prompt 3, completion 1: a: E: x"
    )
    assert first_fault([group_of(None)]) == ""


def stepwise(pieces: list[str], parts: list[Part], truncated: Any = "reward", reason: Any = "stop") -> Rollout:
    """A completion whose tokens are the pieces, under process supervision with marks of ";"."""
    one = Completion(tuple(range(len(pieces))), (0.0,) * len(pieces), reason, "".join(pieces))
    marks = Marks(lambda ids: "".join(pieces[i] for i in ids), delimiter=";")
    (group,) = score_groups([PROMPT], [[one]], parts, truncated=truncated, truncation_reward=-0.5, marks=marks)
    return group.rollouts[0]


def test_steps_are_scored_and_the_outcome_goes_to_the_last():
    calls = []

    def steps(texts, answer, row):
        calls.append((texts, answer, row))
        return [len(text) for text in texts]

    parts = [Part("steps", 0.5, steps, per_step=True), Part("outcome", 2.0, lambda text, answer, row: len(text))]
    rollout = stepwise(["ab", ";", "c;", "def", "g"], parts)
    assert calls == [(["ab;", "c;", "defg"], "12", {"level": 2})]
    assert rollout.steps == ((1, 1.5), (2, 1.0), (4, 2.0 + 2 * 9))  # half of 3, 2 and 4; the outcome's 9 twice
    assert rollout.parts == (("steps", 3.0), ("outcome", 9.0)) and rollout.reward == 0.5 * 3 + 2 * 9


def test_a_batch_function_scores_steps_too():
    part = Part("b", 1.0, lambda several, answers, rows: [range(len(s)) for s in several], batch=True, per_step=True)
    assert stepwise(["a;", "b;", "c"], [part]).steps == ((0, 0.0), (1, 1.0), (2, 2.0))


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ([1.0], "p: ValueError: the per-step function returned 1 results for 2 steps"),
        (1.0, "p: TypeError: 'float' object is not iterable"),
        ("ab", "p: TypeError: the per-step function returned str, not a list of numbers"),
        ([1.0, math.nan], "p: ValueError: the reward function returned nan, not a finite number"),
    ],
)
def test_a_fault_leaves_steps_that_teach_nothing_by_themselves(result: Any, error: str):
    rollout = stepwise(["a;", "b"], [Part("p", 1.0, lambda *_: result, per_step=True)])
    assert rollout.error == error and rollout.reward == 0.0 and rollout.parts == (("p", None),)
    assert rollout.steps == ((0, 0.0), (1, 0.0))


def test_a_penalized_completion_is_one_step():
    part = Part("p", 1.0, lambda *_: pytest.fail("asked"), per_step=True)
    assert stepwise(["a;", "b"], [part], "penalize", "length").steps == ((1, -0.5),)


def test_a_models_outcomes_are_given():
    """By weight beside a function's; what it could not score costs that completion; steps get a value each."""
    parts = [Part("judge", 0.5, None, model="rm"), Part("one", 1.0, lambda text, answer, row: 1.0)]
    completions = [[Completion((1,), (-1.0,), "stop", text=t) for t in "ab"], [Completion((1,), (-1.0,), "length")]]
    prompts = [Prompt(n, "", (1,)) for n in range(2)]
    given = {"rm": [((3.0,), None), (None, "DataError: too long")]}
    rule = {"truncated": "penalize", "truncation_reward": -2.0}
    (first, second), (third,) = (
        group.rollouts for group in score_groups(prompts, completions, parts, given=given, **rule)
    )
    assert (first.reward, first.parts) == (2.5, (("judge", 3.0), ("one", 1.0)))
    assert (second.reward, second.error) == (0.0, "judge: DataError: too long")
    assert (third.reward, third.parts) == (-2.0, ())
    (faulty, _), _ = (
        group.rollouts
        for group in score_groups(prompts, completions, parts, given={"rm": [((float("nan"),), None)] * 2}, **rule)
    )
    assert faulty.error == "judge: ValueError: the reward function returned nan, not a finite number"


def test_a_process_models_outcomes_are_one_a_step():
    ids = tuple(b"a\n\nb")
    completion = Completion(ids, (-1.0,) * 4, "stop", text="a\n\nb")
    marks = Marks(lambda ids: bytes(ids).decode(), delimiter="\n\n")
    parts = [Part("judge", 2.0, None, per_step=True, model="rm")]
    rule = {"truncated": "reward", "truncation_reward": 0.0, "marks": marks}
    ((rollout,),) = (g.rollouts for g in score_groups([Prompt(0, "", (1,))], [[completion]], parts,
                                                      given={"rm": [((0.25, 0.75), None)]}, **rule))  # fmt: skip
    assert rollout.steps == ((2, 0.5), (3, 1.5)) and rollout.reward == 1.0 and rollout.parts == (("judge", 0.5),)
    ((wrong,),) = (g.rollouts for g in score_groups([Prompt(0, "", (1,))], [[completion]], parts,
                                                    given={"rm": [((0.25,), None)]}, **rule))  # fmt: skip
    assert wrong.error == "judge: ValueError: the per-step function returned 1 results for 2 steps"
