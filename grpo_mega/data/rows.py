"""Data rows: one problem each, checked entry by entry as it is read, whatever it was read from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from grpo_mega.errors import DataError

Message = Mapping[str, Any]


class Row(TypedDict):
    """One problem. `fields` is the row as it was read; `origin` says where: "train.jsonl:12" or "chain_sum[17]".

    `prompt` is its text: of a chat the last user message. `messages` are a chat's, and None for a prompt that is a
    text; a chat of one user message is such a text.
    """

    prompt: str
    messages: tuple[Message, ...] | None
    answer: str | None
    origin: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of an entry are read, and under which recipe key a user names them ("data", "data.sources.1")."""

    prompt: str
    answer: str
    key: str


def read_row(entry: Mapping[str, Any], fields: Fields, where: str, origin: str) -> Row:
    """The row of an entry; errors call it `where`. A field "a.b" is field b of field a, unless one has that very name.

    Raises DataError when the prompt is no non-empty text and no list of messages that ends with the user's, or when the
    answer is there and neither text nor number.
    """
    value = _field(entry, fields.prompt)
    if value is _MISSING:
        known = ", ".join(map(repr, entry)) or "none"
        raise DataError(
            f"{where}: there is no field {fields.prompt!r} (found: {known}); set {fields.key}.prompt_field to one of "
            "them"
        )
    messages = None
    if isinstance(value, (list, tuple)):
        messages = _messages(value, fields.prompt, where)
        value = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        messages = None if len(messages) == 1 else messages
    prompt = checked_text(
        value, fields.prompt, where, "write the prompt as a non-empty string or a list of {role, content}"
    )
    answer = _answer(_field(entry, fields.answer), fields.answer, where)
    return Row(prompt=prompt, messages=messages, answer=answer, origin=origin, fields=entry)


def problem(row: Row) -> str:
    """What makes a row the same problem as another, for keeping held-out problems out of training: its text; of a chat
    its messages but the system's, which only says how to answer."""
    turns = [[m["role"], m["content"]] for m in row["messages"] or () if m["role"] != "system"]
    return json.dumps(turns, ensure_ascii=False) if len(turns) > 1 else row["prompt"]


def checked_text(value: Any, field: str, where: str, remedy: str) -> str:
    """`value` if it is a non-empty text that can be encoded. Raises DataError, which ends in `remedy`."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {field!r} is {_shown(value)}, not a text; {remedy}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair ({value!r}); write both halves") from None
    return value


_MISSING = object()


def _field(entry: Mapping[str, Any], name: str) -> Any:
    if name in entry:
        return entry[name]
    value: Any = entry
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _messages(value: Sequence[Any], field: str, where: str) -> tuple[Message, ...]:
    messages = []
    for number, message in enumerate(value):
        name = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {name!r} is {_shown(message)}; write each message as {{role, content}}")
        # a table gives every message all keys that any has
        message = {key: item for key, item in message.items() if item is not None}
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: {name!r} has {key}={_shown(message.get(key))}, not a text; write each message as "
                    "{role, content}"
                )
        if message["role"] == "user":
            checked_text(message["content"], f"{name}.content", where, "write what the user says")
        messages.append(message)
    last = messages[-1]["role"] if messages else None
    if last not in ("user", "tool") or all(message["role"] != "user" for message in messages):
        raise DataError(
            f"{where}: {field!r} holds {len(messages)} messages, the last from {last!r}, which leaves the policy "
            "nothing to answer; end it with the user's message"
        )
    return tuple(messages)


def _answer(value: Any, field: str, where: str) -> str | None:
    if value is None or value is _MISSING:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise DataError(
            f"{where}: {field!r} is {_shown(value)}; write the answer as a string or a number, or leave it out"
        )
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
