"""Completions and a reward's parts -> scored Groups. A fault of a function costs the completions it was asked about.

That holds for a batch function too, whose one call is about all completions of a replica's step: a remote judge that is
away for a minute must not end a run of days, and completions that are all worth 0 teach nothing wrong. A function that
is simply broken ends the run all the same, after UNSCORED_STEPS steps without one scored completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import MAX_ERROR_CHARS, describe
from grpo_mega.rewards.resolve import Part
from grpo_mega.rewards.steps import Marks, steps_of
from grpo_mega.types import Completion, Group, Prompt, Rollout

UNSCORED_STEPS = 3

TruncationPolicy = Literal["reward", "mask", "penalize"]
Values = tuple[float, ...]  # of one completion: one, or one a reasoning step
Outcome = tuple[Values, None] | tuple[None, str]  # a part's values of one completion, or what went wrong


@dataclass(frozen=True, slots=True)
class Asked:
    """A completion as parts are asked about it."""

    prompt: Prompt
    completion: Completion
    steps: list[str]  # its reasoning steps, under process supervision
    ends: list[int]

    def argument(self, part: Part) -> str | list[str]:
        return self.steps if part.per_step else self.completion.text


def score_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    parts: Sequence[Part],
    *,
    truncated: TruncationPolicy,
    truncation_reward: float,
    marks: Marks | None = None,
    given: Mapping[str, Sequence[Outcome]] | None = None,
) -> list[Group]:
    """Score completions[k], the completions of prompts[k], in order: the sum of each part's weight times its value.

    A part is called as function(text, answer, row), once a completion, or, a batch part, as function(texts, answers,
    rows) once, with lists that hold the completions of all prompts; what it asks for by keyword comes beside that. A
    part that is `per_step` gets the list of a completion's steps in its text's place, and gives a list of as many.
    given: of each reward model that parts name, its outcomes of the completions that are `asked_about`, in order.

    marks: process supervision. Rollout.steps then hold each step's reward, the weighted sum of what the per-step parts
    gave for it; what the others gave is added to the last step's. Rollout.reward adds up the parts' means over steps.

    A completion cut by the length limit (`finish_reason == "length"`), by `truncated`:
        reward      is scored like any other
        mask        is scored, which moves the group's mean and std, but does not count in the loss
        penalize    gets `truncation_reward` and has no parts; no function is asked about it

    If a part raises (SystemExit included), or gives anything but a finite real number, that completion gets reward 0.0,
    None as that part's value, and `error` "part: Type: message"; nothing is raised. The same for every completion of a
    batch call that raises or gives another number of results. KeyboardInterrupt passes.
    """
    asked = asked_about(prompts, completions, truncated, marks)
    outcomes = [_outcomes(part, asked, given or {}) for part in parts]
    scored = (_rollout(one, parts, [of_part[n] for of_part in outcomes], truncated) for n, one in enumerate(asked))

    def penalised(one: Completion) -> Rollout:
        steps = () if marks is None else ((len(one.token_ids) - 1, truncation_reward),)
        return Rollout(one, truncation_reward, steps=steps)

    return [
        Group(prompt, tuple(next(scored) if _is_asked(one, truncated) else penalised(one) for one in several))
        for prompt, several in zip(prompts, completions, strict=True)
    ]


def asked_about(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    truncated: TruncationPolicy,
    marks: Marks | None = None,
) -> list[Asked]:
    """The completions that a reward's parts are asked about, in order; see `score_groups`."""
    return [
        Asked(prompt, one, *(([], []) if marks is None else steps_of(one, marks)))
        for prompt, several in zip(prompts, completions, strict=True)
        for one in several
        if _is_asked(one, truncated)
    ]


def _is_asked(completion: Completion, truncated: TruncationPolicy) -> bool:
    return not (truncated == "penalize" and completion.finish_reason == "length")


def unscored_steps(groups: Sequence[Group], before: int) -> int:
    """How many steps in a row, this one included, had no completion scored without a fault: 0 or before + 1.

    groups: all of the step's. Raises RewardError at UNSCORED_STEPS, naming the first fault.
    """
    if not all(rollout.error is not None for group in groups for rollout in group.rollouts):
        return 0
    if before + 1 == UNSCORED_STEPS:
        raise RewardError(
            f"the reward failed for every completion of {UNSCORED_STEPS} steps in a row, {first_fault(groups)}; mend "
            "the function and start again: the run goes on from its latest checkpoint"
        )
    return before + 1


def first_fault(groups: Sequence[Group]) -> str:
    """The first completion whose reward failed and how; "" if none did."""
    for group in groups:
        for number, rollout in enumerate(group.rollouts):
            if rollout.error is not None:
                return f"first at prompt {group.prompt.index}, completion {number}: {rollout.error}"
    return ""


def _rollout(asked: Asked, parts: Sequence[Part], outcomes: Sequence[Outcome], truncated: TruncationPolicy) -> Rollout:
    completion, count = asked.completion, len(asked.ends)
    means = tuple(
        (part.name, None if values is None else sum(values) / len(values))
        for part, (values, _) in zip(parts, outcomes, strict=True)
    )
    faults = [f"{part.name}: {fault}" for part, (_, fault) in zip(parts, outcomes, strict=True) if fault is not None]
    reward = sum(part.weight * mean for part, (_, mean) in zip(parts, means, strict=True) if mean is not None)
    rewards = [0.0] * count
    for part, (values, _) in zip(parts, outcomes, strict=True):
        if count and not faults and values is not None:
            for step, value in zip(range(count) if part.per_step else (count - 1,), values, strict=True):
                rewards[step] += part.weight * value
    if not faults and not all(map(math.isfinite, (reward, *rewards))):
        faults.append(f"ValueError: the weighted sum of {dict(means)} is {reward}, not a finite number")
    return Rollout(
        completion,
        0.0 if faults else float(reward),
        error="; ".join(faults)[:MAX_ERROR_CHARS] if faults else None,
        counts=not (completion.finish_reason == "length" and truncated == "mask"),
        parts=means,
        steps=tuple(zip(asked.ends, [0.0] * count if faults else rewards, strict=True)),
    )


def _outcomes(part: Part, asked: Sequence[Asked], given: Mapping[str, Sequence[Outcome]]) -> list[Outcome]:
    if part.model is None:
        return _batch(part, asked) if part.batch else [_one(part, one) for one in asked]
    return [
        outcome if outcome[0] is None else _outcome(part, outcome[0] if part.per_step else outcome[0][0], one)
        for outcome, one in zip(given[part.model], asked, strict=True)
    ]


def _one(part: Part, asked: Asked) -> Outcome:
    assert part.function is not None, "a model's outcomes are given"
    extras = {name: getattr(asked.completion, name) for name in part.extras}
    try:
        result = part.function(asked.argument(part), asked.prompt.answer, asked.prompt.row, **extras)
    except (Exception, SystemExit) as error:
        return None, describe(error)
    return _outcome(part, result, asked)


def _batch(part: Part, asked: Sequence[Asked]) -> list[Outcome]:
    assert part.function is not None, "a model's outcomes are given"
    if not asked:
        return []
    extras = {name: [getattr(one.completion, name) for one in asked] for name in part.extras}
    arguments = [one.argument(part) for one in asked]
    answers, rows = [one.prompt.answer for one in asked], [one.prompt.row for one in asked]
    try:
        results = _listed(part.function(arguments, answers, rows, **extras), len(asked), "completions")
    except (Exception, SystemExit) as error:
        return [(None, describe(error))] * len(asked)
    return [_outcome(part, result, one) for result, one in zip(results, asked, strict=True)]


def _outcome(part: Part, result: Any, asked: Asked) -> Outcome:
    """What a part gave for one completion, as numbers."""
    if not part.per_step:
        return _number(result)
    try:
        numbers = [_number(one) for one in _listed(result, len(asked.steps), "steps")]
    except (Exception, SystemExit) as error:
        return None, describe(error)
    faults = [fault for _, fault in numbers if fault is not None]
    return (None, faults[0]) if faults else (tuple(value for values, _ in numbers for value in values or ()), None)


def _listed(results: Any, count: int, what: str) -> list[Any]:
    kind = "batch function" if what == "completions" else "per-step function"
    if isinstance(results, (str, Mapping, Set)):
        raise TypeError(f"the {kind} returned {type(results).__name__}, not a list of numbers")
    results = list(results)
    if len(results) != count:
        raise ValueError(f"the {kind} returned {len(results)} results for {count} {what}")
    return results


def _number(result: Any) -> Outcome:
    if not isinstance(result, Real):  # float, int, bool, numpy's scalars; not a tensor, a string or a coroutine
        return None, f"TypeError: the reward function returned {type(result).__name__}, not a number"
    try:
        value = float(result)
    except Exception as error:
        return None, describe(error)
    if not math.isfinite(value):
        return None, f"ValueError: the reward function returned {value}, not a finite number"
    return (value,), None
