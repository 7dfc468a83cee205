"""The policy's tokenizer and chat template: the only module that talks to transformers about text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.errors import DataError


class ChatTokenizer:
    """A Hugging Face tokenizer, seen as the four things that training asks of one.

    stop_token_ids: ascending; the tokenizer's end of sequence and what generation_config.json adds (end of turn).
    vocab_size: all ids it can produce, added tokens included; at most the model's (padded) vocabulary.
    """

    def __init__(self, tokenizer: Any, *, name: str = "tokenizer", more_stop_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._name = tokenizer, name
        eos = tokenizer.eos_token_id
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({*more_stop_token_ids, *([] if eos is None else [eos])}))
        self.vocab_size: int = len(tokenizer)

    def prompt_ids(self, user_text: str, system: str | None = None) -> tuple[int, ...]:
        """Token ids of one user message, ready for the policy to answer.

        With a chat template: `system` None leaves the system message to the template (some bring one of their own);
        any text, "" too, is sent as the system message, and an empty one is how a template's own is replaced by
        nothing. Without one: the text as it stands, with the special tokens that the tokenizer adds.

        Special tokens spelled out in `user_text` become special tokens; rows are taken to be trusted.
        Raises DataError when the template refuses the messages, or when there is no place for a system message.
        """
        if not self._tokenizer.chat_template:
            if system:
                raise DataError(
                    f"data.system={system!r}, but {self._name} has no chat template to put it in; "
                    "write it into data.instruction"
                )
            return tuple(self._tokenizer.encode(user_text))
        messages = [{"role": "user", "content": user_text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program of the model's: jinja2's errors, and whatever it raises
            remedy = "leave data.system out" if system is not None else "mend the template in tokenizer_config.json"
            raise DataError(f"the chat template of {self._name} failed ({error}); {remedy}") from None
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without special tokens and without tidying of spaces."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """The tokenizer in a Hugging Face model folder; never the network, never code from the folder. Raises DataError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"model.path={folder} is no folder; give one with tokenizer.json and tokenizer_config.json")
    from transformers import AutoTokenizer  # seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:197] + "..."
        raise DataError(
            f"model.path={folder} holds no tokenizer that transformers can load ({reason}); "
            "put tokenizer.json and tokenizer_config.json there"
        ) from None
    return ChatTokenizer(tokenizer, name=str(folder), more_stop_token_ids=_generation_stops(folder))


def _generation_stops(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    try:
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend it or delete it") from None
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int and stop >= 0 for stop in stops):
        raise DataError(f"{path}: eos_token_id={stops!r}; write one token id or a list of them")
    return stops
