"""Completions of one prompt and a reward function -> a scored Group. A fault of the function costs one completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

from grpo_mega.rewards.resolve import RewardFunction
from grpo_mega.types import Completion, Group, Prompt, Rollout

MAX_ERROR_CHARS = 200

TruncationPolicy = Literal["reward", "mask", "penalize"]


def score_group(
    prompt: Prompt,
    completions: Sequence[Completion],
    reward: RewardFunction,
    *,
    truncated: TruncationPolicy,
    truncation_reward: float,
) -> Group:
    """Score each completion, in order: reward(completion.text, prompt.answer, prompt.row).

    A completion cut by the length limit (`finish_reason == "length"`), by `truncated`:
        reward      is scored like any other
        mask        is scored, which moves the group's mean and std, but does not count in the loss
        penalize    gets `truncation_reward`; the function is not called

    If the function raises (SystemExit included), or returns anything but a finite real number, that completion gets
    reward 0.0 and `error` "Type: message"; nothing is raised. KeyboardInterrupt passes.
    """

    def rollout(completion: Completion) -> Rollout:
        cut = completion.finish_reason == "length"
        if cut and truncated == "penalize":
            return Rollout(completion, truncation_reward)
        value, error = _call(reward, completion, prompt)
        return Rollout(completion, value, error, counts=not (cut and truncated == "mask"))

    return Group(prompt, tuple(rollout(completion) for completion in completions))


def _call(reward: RewardFunction, completion: Completion, prompt: Prompt) -> tuple[float, str | None]:
    try:
        result = reward(completion.text, prompt.answer, prompt.row)
        if not isinstance(result, Real):  # float, int, bool, numpy's scalars; not a tensor, a string or a coroutine
            return 0.0, f"TypeError: the reward function returned {type(result).__name__}, not a number"
        value = float(result)
    except (Exception, SystemExit) as error:
        return 0.0, _describe(error)
    if not math.isfinite(value):
        return 0.0, f"ValueError: the reward function returned {value}, not a finite number"
    return value, None


def _describe(error: BaseException) -> str:
    """Type: message, on one line of at most MAX_ERROR_CHARS, whatever the exception's own __str__ does."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {' '.join(message[:MAX_ERROR_CHARS].split())}"[:MAX_ERROR_CHARS]
