"""Completions and a reward's parts -> scored Groups. A fault of a function costs the completions it was asked about.

That holds for a batch function too, whose one call is about all completions of a replica's step: a remote judge that is
away for a minute must not end a run of days, and completions that are all worth 0 teach nothing wrong. A function that
is simply broken ends the run all the same, after UNSCORED_STEPS steps without one scored completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any, Literal

from grpo_mega.errors import RewardError
from grpo_mega.rewards.bounded import MAX_ERROR_CHARS, describe
from grpo_mega.rewards.resolve import Part
from grpo_mega.types import Completion, Group, Prompt, Rollout

UNSCORED_STEPS = 3

TruncationPolicy = Literal["reward", "mask", "penalize"]
Outcome = tuple[float, None] | tuple[None, str]  # a part's value of one completion, or what went wrong


def score_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    parts: Sequence[Part],
    *,
    truncated: TruncationPolicy,
    truncation_reward: float,
    given: Mapping[str, Sequence[Outcome]] | None = None,
) -> list[Group]:
    """Score completions[k], the completions of prompts[k], in order: the sum of each part's weight times its value.

    A part is called as function(text, answer, row), once a completion, or, a batch part, as function(texts, answers,
    rows) once, with lists that hold the completions of all prompts; what it asks for by keyword comes beside that.
    given: of each reward model that parts name, its outcomes of the completions that are `asked` about, in order.

    A completion cut by the length limit (`finish_reason == "length"`), by `truncated`:
        reward      is scored like any other
        mask        is scored, which moves the group's mean and std, but does not count in the loss
        penalize    gets `truncation_reward` and has no parts; no function is asked about it

    If a part raises (SystemExit included), or gives anything but a finite real number, that completion gets reward 0.0,
    None as that part's value, and `error` "part: Type: message"; nothing is raised. The same for every completion of a
    batch call that raises or gives another number of results. KeyboardInterrupt passes.
    """
    pairs = asked(prompts, completions, truncated)
    outcomes = [_outcomes(part, pairs, given or {}) for part in parts]
    scored = (
        _rollout(completion, parts, [of_part[n] for of_part in outcomes], truncated)
        for n, (_, completion) in enumerate(pairs)
    )
    return [
        Group(
            prompt,
            tuple(next(scored) if _is_asked(one, truncated) else Rollout(one, truncation_reward) for one in several),
        )
        for prompt, several in zip(prompts, completions, strict=True)
    ]


def asked(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], truncated: TruncationPolicy
) -> list[tuple[Prompt, Completion]]:
    """The completions that a reward's parts are asked about, in order, each with its prompt."""
    pairs = [(prompt, one) for prompt, several in zip(prompts, completions, strict=True) for one in several]
    return [(prompt, completion) for prompt, completion in pairs if _is_asked(completion, truncated)]


def _is_asked(completion: Completion, truncated: TruncationPolicy) -> bool:
    return not (truncated == "penalize" and completion.finish_reason == "length")


def _outcomes(
    part: Part, pairs: Sequence[tuple[Prompt, Completion]], given: Mapping[str, Sequence[Outcome]]
) -> Sequence[Outcome]:
    if part.model is None:
        return _batch(part, pairs) if part.batch else [_one(part, *pair) for pair in pairs]
    outcomes = given[part.model]
    if len(outcomes) != len(pairs):
        raise ValueError(f"reward model {part.model} has {len(outcomes)} outcomes for {len(pairs)} completions")
    return [_number(value) if fault is None else (None, fault) for value, fault in outcomes]


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


def _rollout(
    completion: Completion, parts: Sequence[Part], outcomes: Sequence[Outcome], truncated: TruncationPolicy
) -> Rollout:
    values = tuple((part.name, value) for part, (value, _) in zip(parts, outcomes, strict=True))
    faults = [f"{part.name}: {fault}" for part, (_, fault) in zip(parts, outcomes, strict=True) if fault is not None]
    reward = sum(part.weight * value for part, (value, _) in zip(parts, outcomes, strict=True) if value is not None)
    if not faults and not math.isfinite(reward):
        faults.append(f"ValueError: the weighted sum of {dict(values)} is {reward}, not a finite number")
    return Rollout(
        completion,
        0.0 if faults else float(reward),
        error="; ".join(faults)[:MAX_ERROR_CHARS] if faults else None,
        counts=not (completion.finish_reason == "length" and truncated == "mask"),
        parts=values,
    )


def _one(part: Part, prompt: Prompt, completion: Completion) -> Outcome:
    assert part.function is not None, "a model's outcomes are given"
    extras = {name: getattr(completion, name) for name in part.extras}
    try:
        return _number(part.function(completion.text, prompt.answer, prompt.row, **extras))
    except (Exception, SystemExit) as error:
        return None, describe(error)


def _batch(part: Part, pairs: Sequence[tuple[Prompt, Completion]]) -> list[Outcome]:
    assert part.function is not None, "a model's outcomes are given"
    if not pairs:
        return []
    extras = {name: [getattr(completion, name) for _, completion in pairs] for name in part.extras}
    texts = [completion.text for _, completion in pairs]
    answers, rows = [prompt.answer for prompt, _ in pairs], [prompt.row for prompt, _ in pairs]
    try:
        results = part.function(texts, answers, rows, **extras)
        if isinstance(results, (str, Mapping, Set)):
            raise TypeError(f"the batch function returned {type(results).__name__}, not a list of numbers")
        results = list(results)
        if len(results) != len(pairs):
            raise ValueError(f"the batch function returned {len(results)} results for {len(pairs)} completions")
    except (Exception, SystemExit) as error:
        return [(None, describe(error))] * len(pairs)
    return [_number(result) for result in results]


def _number(result: Any) -> Outcome:
    if not isinstance(result, Real):  # float, int, bool, numpy's scalars; not a tensor, a string or a coroutine
        return None, f"TypeError: the reward function returned {type(result).__name__}, not a number"
    try:
        value = float(result)
    except Exception as error:
        return None, describe(error)
    if not math.isfinite(value):
        return None, f"ValueError: the reward function returned {value}, not a finite number"
    return value, None
