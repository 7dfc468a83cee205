"""reasoning-gym tasks: problems made by a generator, seeded by the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_mega.config.base import nearest
from grpo_mega.data.rows import Fields, Row, checked_text, demonstration_of
from grpo_mega.errors import DataError

DEFAULT_TASK_SIZE = 2000


def read_task(name: str, task: Mapping[str, Any], seed: int, fields: Fields) -> list[Row]:
    """The problems of a task with parameters `task`, DEFAULT_TASK_SIZE of them unless it gives a size.

    Of `fields` the demonstration's and the key count: a task has names of its own for question and answer. Where a
    demonstration is needed, its field must be named (`answer`, say). Raises DataError.
    """
    key = fields.key
    if fields.demonstrations == "required" and fields.completion is None:
        raise DataError(
            f"{key}.reasoning_gym={name} makes problems without demonstrations, which sampling.source=data trains on; "
            f"set {key}.completion_field (answer has a problem's answer), or use data that has them"
        )
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"{key}.reasoning_gym={name} needs the package reasoning-gym, which cannot be imported ({error}); "
            f"pip install reasoning-gym, or use {key}.jsonl"
        ) from None
    if name not in DATASETS:
        raise DataError(f"{key}.reasoning_gym={name} is no task of reasoning-gym{nearest(name, DATASETS)}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name != "seed"]
    for parameter in task:
        if parameter == "seed":
            raise DataError(f"{key}.task.seed={task['seed']!r}: a task is seeded by run.seed; set that instead")
        if parameter not in known:
            raise DataError(f"{key}.task.{parameter} is no parameter of {name}{nearest(parameter, known)}")
    try:
        entries = list(reasoning_gym.create_dataset(name, seed=seed, **{"size": DEFAULT_TASK_SIZE, **task}))
    except Exception as error:  # a task's own checks raise AssertionError, TypeError, ValueError, ...
        raise DataError(
            f"{key}.task={dict(task)} does not suit reasoning-gym's {name} ({type(error).__name__}: {error}); "
            f"its parameters are {', '.join(known)}"
        ) from None
    if not entries:
        raise DataError(f"{key}.task={dict(task)} makes no problem of {name}; give it a size of at least 1")
    rows = []
    for index, entry in enumerate(entries):
        origin = f"{name}[{index}]"
        # answers are of types of the task's own; its scorer reads the entry itself
        answer = None if entry["answer"] is None else str(entry["answer"])
        prompt = checked_text(entry["question"], "question", origin, "leave the task out")
        shown = demonstration_of(entry, None, fields, origin)
        rows.append(Row(prompt=prompt, messages=None, answer=answer, demonstration=shown, origin=origin, fields=entry))
    return rows
