"""Data rows: one problem each, checked entry by entry as it is read, whatever it was read from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from grpo_mega.errors import DataError

Message = Mapping[str, Any]


class Row(TypedDict):
    """One problem. `fields` is the row as it was read; `origin` says where: "train.jsonl:12" or "chain_sum[17]".

    `prompt` is its text: of a chat the last user message. `messages` are a chat's, and None for a prompt that is a
    text; a chat of one user message is such a text. `demonstration` is what the policy should write, which is none of
    `messages`; None where that was not asked for.
    """

    prompt: str
    messages: tuple[Message, ...] | None
    answer: str | None
    demonstration: str | None
    origin: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of an entry are read, and under which recipe key a user names them ("data", "data.sources.1").

    demonstrations: whether an entry must say what the policy should write: in the field `completion`, or, where that is
    None, by a conversation in which the assistant has the last word. `dropped`: a last word is passed over.
    """

    prompt: str
    answer: str
    key: str
    completion: str | None = None
    demonstrations: Literal["none", "dropped", "required"] = "none"


def read_row(entry: Mapping[str, Any], fields: Fields, where: str, origin: str) -> Row:
    """The row of an entry; errors call it `where`. A field "a.b" is field b of field a, unless one has that very name.

    Raises DataError when the prompt is no non-empty text and no list of messages that ends with the user's, when the
    answer is there and neither text nor number, or when the demonstration is missing or no non-empty text.
    """
    value = _field(entry, fields.prompt)
    if value is _MISSING:
        known = ", ".join(map(repr, entry)) or "none"
        raise DataError(
            f"{where}: there is no field {fields.prompt!r} (found: {known}); set {fields.key}.prompt_field to one of "
            "them"
        )
    messages = last = None
    if isinstance(value, (list, tuple)):
        messages = _messages(value, fields.prompt, where)
        if fields.demonstrations != "none" and fields.completion is None and messages:
            messages, last = (messages[:-1], messages[-1]) if messages[-1]["role"] == "assistant" else (messages, None)
        _check_end(messages, fields, where)
        value = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        messages = None if len(messages) == 1 else messages
    prompt = checked_text(
        value, fields.prompt, where, "write the prompt as a non-empty string or a list of {role, content}"
    )
    answer = _answer(_field(entry, fields.answer), fields.answer, where)
    demonstration = demonstration_of(entry, last, fields, where)
    return Row(
        prompt=prompt, messages=messages, answer=answer, demonstration=demonstration, origin=origin, fields=entry
    )


def demonstration_of(entry: Mapping[str, Any], last: Message | None, fields: Fields, where: str) -> str | None:
    """What an entry has the policy write, if it must. last: the message that its conversation ends with, if that is the
    assistant's. Raises DataError where it is missing or no non-empty text (a number is one)."""
    if fields.demonstrations != "required":
        return None
    if fields.completion is not None:
        name, value = fields.completion, _field(entry, fields.completion)
        if value is _MISSING:
            known = ", ".join(map(repr, entry)) or "none"
            raise DataError(
                f"{where}: there is no field {name!r} (found: {known}), and sampling.source=data trains on what it "
                f"holds; set {fields.key}.completion_field to one of them, or remove the row"
            )
    elif last is not None:
        name, value = f"{fields.prompt}[-1].content", last["content"]
        if more := sorted(last.keys() - {"role", "content"}):
            raise DataError(
                f"{where}: the last message of {fields.prompt!r} has {', '.join(map(repr, more))} beside its content, "
                "and the content alone would be trained on; write all that the policy should write into it"
            )
    else:
        raise DataError(
            f"{where}: {fields.prompt!r} does not end with a message of the assistant's, and sampling.source=data "
            f"trains on one; end it so, or name the field of the demonstration in {fields.key}.completion_field"
        )
    value = str(value) if _is_number(value) else value
    return checked_text(value, name, where, "write what the policy should write, or remove the row")


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
    return tuple(messages)


def _check_end(messages: Sequence[Message], fields: Fields, where: str) -> None:
    """Raise DataError unless a conversation has a user in it, and leaves the policy something to answer."""
    last = messages[-1]["role"] if messages else None
    if last not in ("user", "tool") or all(message["role"] != "user" for message in messages):
        raise DataError(
            f"{where}: {fields.prompt!r} holds {len(messages)} messages, the last from {last!r}, which leaves the "
            "policy nothing to answer; end it with the user's message"
        )


def _answer(value: Any, field: str, where: str) -> str | None:
    if value is None or value is _MISSING:
        return None
    if not _is_number(value) and not isinstance(value, str):
        raise DataError(
            f"{where}: {field!r} is {_shown(value)}; write the answer as a string or a number, or leave it out"
        )
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
