"""The `reasoning_gym` reward: the scorer of the task that made the row, on the one answer that a completion commits to.

The library's scorers are not made for training as they are. Most pay a part of the reward where the reference merely
occurs in the text, some 0.01 for anything, game_of_life_halting 1.0 for any word where the answer is False; some
raise, and some evaluate the text (a countdown of 9**9**9**9 never ends). So the answer is taken from the completion
first, only a full score counts unless `strict: false`, a full score that nonsense gets too is refused, and scorers run
under `rewards/bounded`, which limits time and memory and is no sandbox.

Which answer: of a number, `exact`'s rules. Otherwise what the last marker holds (\\boxed{...}, <answer>...</answer>;
"answer is ..." too where the reference is one line), or without one the last line that is not blank, the whole text
where the reference has several lines or the task gives none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from grpo_mega.config.base import nearest
from grpo_mega.config.reward import ReasoningGymOptions
from grpo_mega.errors import RewardError
from grpo_mega.rewards import exact
from grpo_mega.rewards.bounded import bounded
from grpo_mega.rewards.exact import MAX_CHARS, extract_answer, is_number, marked_text

NONSENSE = "~ no answer ~"


def reasoning_gym(options: ReasoningGymOptions) -> Callable[[str, str | None, Mapping[str, Any]], float]:
    """The reward function; `row` is a reasoning-gym entry (question, answer, metadata with source_dataset).

    It raises BoundedError when the scorer raises, takes longer than `options.time_limit`, or (strict) pays nonsense.
    Raises RewardError for tasks and parameters in `options.tasks` that do not exist, or without the library.
    """
    for task, parameters in options.tasks.items():
        check_task(task, parameters)
    call = bounded(f"{__name__}:scored")

    def score(completion: str, answer: str | None, row: Mapping[str, Any]) -> float:
        text = committed_answer(completion, row.get("answer"))
        if not text:
            return 0.0
        task = row["metadata"]["source_dataset"]
        entry = {key: row[key] for key in ("question", "answer", "metadata") if key in row}
        return float(call(options.time_limit, task, options.tasks.get(task, {}), entry, text, options.strict))

    return score


def check_task_of(row: Mapping[str, Any]) -> None:
    """Raise RewardError unless the row tells which task of reasoning-gym made it."""
    metadata = row.get("metadata")
    task = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(task, str):
        raise RewardError(
            "there is no metadata.source_dataset, by which the reward function reasoning_gym finds the task's scorer; "
            "use rows made by reasoning-gym, or another reward function"
        )
    check_task(task, {})


def check_task(task: str, parameters: Mapping[str, Any]) -> None:
    """Raise RewardError unless reasoning-gym is there, has `task`, and the task takes `parameters`."""
    try:
        import reasoning_gym  # noqa: F401  # importing it fills DATASETS
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RewardError(
            f"the reward function reasoning_gym needs the package reasoning-gym, which cannot be imported ({error}); "
            "pip install reasoning-gym"
        ) from None
    if task not in DATASETS:
        raise RewardError(f"{task!r} is no task of reasoning-gym{nearest(task, DATASETS)}")
    config = DATASETS[task][1]
    known = [field.name for field in fields(config)]
    for key in parameters:
        if key not in known:
            raise RewardError(f"tasks.{task}.{key} is no parameter of {task}{nearest(key, known)}")
    if parameters:
        try:
            config(**parameters).validate()
        except Exception as error:  # AssertionError, TypeError, ValueError, ...
            raise RewardError(
                f"tasks.{task}={dict(parameters)} does not suit the task ({type(error).__name__}: {error}); its "
                f"parameters are {', '.join(known)}"
            ) from None


def committed_answer(text: str, reference: Any) -> str:
    """The one answer that `text` commits to (see the module), "" if there is none."""
    reference = reference.strip() if isinstance(reference, str) else ""
    if is_number(reference):
        return extract_answer(text) or ""
    one_line = reference != "" and len(reference.splitlines()) == 1
    found = marked_text(text, clauses=one_line).strip()
    if not found:
        text = text[-MAX_CHARS:].strip()
        found = text.splitlines()[-1] if one_line and text else text
    return found.strip(" \t*`") or found  # emphasis around it, unless it is all there is


def vote(completion: str, answer: str | None, row: Mapping[str, Any]) -> tuple[Hashable, str] | None:
    """What a completion's answer is equal to others by, and the answer as text; None if there is none.

    Numbers are compared by value, all else by its words: a scorer can tell only what is right.
    """
    reference = row.get("answer")
    if isinstance(reference, str) and is_number(reference):
        return exact.vote(completion, reference, row)
    found = committed_answer(completion, reference)
    return (" ".join(found.split()).casefold(), found) if found else None


def scored(task: str, parameters: dict[str, Any], entry: dict[str, Any], text: str, strict: bool) -> float:
    """What the task's scorer gives `text`; strict: 1.0 for a full score, else 0.0. To be called under a limit.

    Raises RewardError when strict and the scorer gives nonsense a full score as well.
    """
    scorer = _scorer(task, json.dumps(parameters, sort_keys=True))
    value = float(scorer(text, entry))
    if not strict:
        return value
    if not value >= 1.0:
        return 0.0
    try:
        nonsense = float(scorer(NONSENSE, entry))
    except Exception:
        nonsense = 0.0
    if nonsense >= 1.0:
        raise RewardError(f"{task}'s scorer gives nonsense a full score here too; use reward.function=exact for it")
    return 1.0


def prepare() -> None:
    """Imports (3 s), before any time limit runs."""
    import reasoning_gym  # noqa: F401


@cache
def _scorer(task: str, parameters: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym.factory import DATASETS

    dataset, config = DATASETS[task]
    return dataset(config=config(**json.loads(parameters))).score_answer
