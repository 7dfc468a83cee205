"""What reward models learn from: answers that were compared in pairs, or called right or wrong one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_mega.data.rows import Fields, Message, Row, problem
from grpo_mega.data.sources.jsonl import read_jsonl
from grpo_mega.errors import DataError

Kind = Literal["preference", "label"]
FIELDS: dict[Kind, tuple[str, ...]] = {"preference": ("chosen", "rejected"), "label": ("completion", "label")}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A conversation and its judged answers: (chosen, rejected), or one with a label in [0, 1] (1: right).

    origin: where it was read, "train.jsonl:12". problem: what it asks, by which held-out rows are kept out of training.
    """

    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    label: float | None
    origin: str
    problem: str


def read_judgements(name: str, said: str) -> tuple[Kind, list[Judgement]]:
    """The rows of a JSONL file: {prompt, chosen, rejected} all of them, or {prompt, completion, label}.

    Raises DataError naming file and line, the value found and the remedy; messages call the file `said`=name.
    """
    rows = read_jsonl(name, Fields("prompt", "answer", "data"), said)
    kind = _kind(rows[0])
    return kind, [_judgement(row, kind) for row in rows]


def _kind(row: Row) -> Kind:
    fields = row["fields"]
    kinds = [kind for kind, names in FIELDS.items() if any(name in fields for name in names)]
    if len(kinds) != 1:
        words = ", ".join(map(repr, fields))
        raise DataError(
            f"{row['origin']}: the row has the fields {words}; write prompt, chosen and rejected, or prompt, "
            "completion and label (0 to 1)"
        )
    return kinds[0]


def _judgement(row: Row, kind: Kind) -> Judgement:
    fields, origin = row["fields"], row["origin"]
    for name in FIELDS[kind]:
        if name not in fields:
            raise DataError(
                f"{origin}: there is no field {name!r}, and the file's first row is a {kind}; write prompt, "
                f"{' and '.join(FIELDS[kind])} in every row"
            )
    names = FIELDS[kind] if kind == "preference" else FIELDS[kind][:1]
    answers = tuple(_text(fields, name, origin) for name in names)
    if len(set(answers)) < len(answers):
        raise DataError(f"{origin}: chosen and rejected are the same text, which teaches nothing; remove the row")
    messages = row["messages"] or ({"role": "user", "content": row["prompt"]},)
    label = _label(fields["label"], origin) if kind == "label" else None
    return Judgement(messages, answers, label, origin, problem(row))


def _text(fields: Mapping[str, Any], name: str, origin: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise DataError(f"{origin}: {name!r} is {value!r:.60}, not a text; write the answer as a non-empty string")
    return value


def _label(value: Any, origin: str) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise DataError(
            f"{origin}: 'label' is {value!r:.60}; write 1 or true for a right answer, 0 or false for a wrong one"
        )
    return float(value)


def hold_out(
    judgements: Sequence[Judgement], count: int, order: Sequence[int]
) -> tuple[list[Judgement], list[Judgement]]:
    """(training, held out): the rows of the first `count` distinct problems in `order`, a permutation, are held out.

    Raises DataError when none is left to train on.
    """
    distinct = list(dict.fromkeys(judgements[i].problem for i in order))
    kept_out = set(distinct[:count])
    if len(kept_out) == len(distinct):
        raise DataError(
            f"data.heldout={count} takes every one of the {len(distinct)} distinct prompts and leaves none to train "
            f"on; use data.heldout={len(distinct) // 10} or give more data"
        )
    heldout = [row for row in judgements if row.problem in kept_out]
    return [row for row in judgements if row.problem not in kept_out], heldout
