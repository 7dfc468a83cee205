"""Data rows: a JSONL file or a reasoning-gym task, checked at once, split into training and held-out rows."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from grpo_mega.config import DataConfig
from grpo_mega.errors import DataError

DEFAULT_TASK_SIZE = 2000


class Row(TypedDict):
    """One problem. `fields` is the row as it was read; `origin` says where: "train.jsonl:12" or "chain_sum[17]"."""

    prompt: str
    answer: str | None
    origin: str
    fields: Mapping[str, Any]


def load_rows(config: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of the recipe's data section.

    Held out are the first `config.heldout` distinct prompt texts in an order shuffled by `seed`, one row each. No
    training row has a held-out text (one-digit sums repeat a lot); repeated texts within the training rows stay.

    Raises DataError naming the file and line (or the task), the value found and the remedy.
    """
    if config.jsonl is not None:
        source, rows = config.jsonl, list(_read_jsonl(config.jsonl, config))
    else:
        assert config.reasoning_gym is not None  # DataConfig asks for exactly one source
        source, rows = config.reasoning_gym, list(_read_task(config.reasoning_gym, config.task, seed))
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row["prompt"], row)
    if config.heldout >= len(distinct):
        raise DataError(
            f"data.heldout={config.heldout} takes every one of the {len(distinct)} distinct prompts of {source} "
            f"({len(rows)} rows) and leaves none to train on; use data.heldout={len(distinct) // 10} or give more data"
        )
    candidates = list(distinct.values())
    heldout = [candidates[i] for i in shuffled(len(candidates), "heldout", seed)[: config.heldout]]
    texts = {row["prompt"] for row in heldout}
    return [row for row in rows if row["prompt"] not in texts], heldout


def shuffled(count: int, *key: str | int) -> list[int]:
    """A permutation of range(count) that `key` decides, the same on every platform and Python version.

    It sorts by uniform numbers because `random.Random(str).random()` is documented to be reproducible and
    `random.shuffle` is not.
    """
    rng = random.Random("/".join(map(str, key)))
    keys = [rng.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _read_jsonl(name: str, config: DataConfig) -> Iterator[Row]:
    path = Path(name)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"data.jsonl={name} cannot be read ({error.strerror}); give a file of one JSON object a line"
        ) from None
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise DataError(f"data.jsonl={name} is empty; give a file of one JSON object a line")
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        entry = _parse_line(line, where)
        prompt = _prompt(entry, config.prompt_field, where)
        answer = _answer(entry.get(config.answer_field), config.answer_field, where)
        yield Row(prompt=prompt, answer=answer, origin=f"{path.name}:{number}", fields=entry)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{where}: the line is empty; delete it")
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {_shown(line)} is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {_shown(line)} is not a JSON object; write {{...}} on each line")
    return entry


def _prompt(entry: Mapping[str, Any], field: str, where: str) -> str:
    if field not in entry:
        known = ", ".join(map(repr, entry)) or "none"
        raise DataError(f"{where}: there is no field {field!r} (found: {known}); set data.prompt_field to one of them")
    prompt = entry[field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: {field!r} is {prompt!r}, not a text; write the prompt as a non-empty string")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair ({prompt!r}); write both halves") from None
    return prompt


def _answer(value: Any, field: str, where: str) -> str | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
        raise DataError(f"{where}: {field!r} is {value!r}; write the answer as a string or a number, or leave it out")
    return None if value is None else str(value)


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_task(name: str, task: Mapping[str, Any], seed: int) -> Iterator[Row]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"data.reasoning_gym={name} needs the package reasoning-gym, which cannot be imported ({error}); "
            "pip install reasoning-gym, or use data.jsonl"
        ) from None
    if name not in DATASETS:
        raise DataError(f"data.reasoning_gym={name} is no task of reasoning-gym{_nearest(name, DATASETS)}")
    known = [field.name for field in fields(DATASETS[name][1]) if field.name != "seed"]
    for key in task:
        if key == "seed":
            raise DataError(f"data.task.seed={task[key]!r}: a task is seeded by run.seed; set that instead")
        if key not in known:
            raise DataError(f"data.task.{key} is no parameter of {name}{_nearest(key, known)}")
    try:
        entries = list(reasoning_gym.create_dataset(name, seed=seed, **{"size": DEFAULT_TASK_SIZE, **task}))
    except Exception as error:  # a task's own checks raise AssertionError, TypeError, ValueError, ...
        raise DataError(
            f"data.task={dict(task)} does not suit reasoning-gym's {name} ({type(error).__name__}: {error}); "
            f"its parameters are {', '.join(known)}"
        ) from None
    for index, entry in enumerate(entries):
        origin = f"{name}[{index}]"
        answer = None if entry["answer"] is None else str(entry["answer"])
        yield Row(prompt=_prompt(entry, "question", origin), answer=answer, origin=origin, fields=entry)


def _nearest(word: str, known: Any) -> str:
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"
