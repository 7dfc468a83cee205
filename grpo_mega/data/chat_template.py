"""Messages -> what a tokenizer encodes, by a chat template of Hugging Face's kind; and what goes wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_mega.data.rows import Message
from grpo_mega.errors import DataError


def apply_template(
    tokenizer: Any, messages: Sequence[Message], origin: str, *, tokenize: bool, answered: bool = False
) -> Any:
    """transformers' rendering of `messages`, with the template's call for an answer unless it is among them
    (`answered`): token ids, or text.

    tokenizer: one of transformers', with a chat template that was read from `origin`.
    Raises DataError when the template is wrong or refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=not answered, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # a template is a program of the model's: jinja2's errors, and whatever it raises
        line = getattr(error, "lineno", None)
        where = origin if line is None else f"{origin}:{line}"
        system = any(message["role"] == "system" for message in messages)
        remedy = "leave the system message (data.system) out, or " if system else ""
        raise DataError(f"the chat template of {where} failed ({error}); {remedy}mend the template") from None


def with_answer(messages: Sequence[Message], answer: str) -> list[Message]:
    """The conversation with the policy's answer at its end."""
    return [*messages, {"role": "assistant", "content": answer}]


def without_template(messages: Sequence[Message], name: str) -> str:
    """The text of a single user message; an empty system message is as good as none. Raises DataError for others."""
    others = [m for m in messages[:-1] if m["role"] != "system" or m["content"]]
    if others and all(m["role"] == "system" for m in others):
        raise DataError(
            f"there is a system message ({others[0]['content']!r}), but {name} has no chat template to put it in; "
            "write it into data.instruction, or give a template in data.chat_template"
        )
    if others:
        raise DataError(
            f"a chat of {len(messages)} messages needs a chat template, and {name} has none; give one in "
            "data.chat_template"
        )
    return messages[-1]["content"]
