"""A Hugging Face tokenizer, as transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.data.chat_template import apply_template, with_answer, without_template
from grpo_mega.data.rows import Message
from grpo_mega.errors import DataError


class HuggingFaceTokenizer:
    """See ChatTokenizer. Special tokens that a message spells out become special tokens: rows are trusted."""

    def __init__(
        self, tokenizer: Any, name: str, more_stop_token_ids: Sequence[int], template: tuple[str, str] | None
    ) -> None:
        self._tokenizer, self._name, self._template_origin = tokenizer, name, name
        if template is not None:
            tokenizer.chat_template, self._template_origin = template
        self.end_token_id: int | None = tokenizer.eos_token_id
        eos = self.end_token_id
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({*more_stop_token_ids, *([] if eos is None else [eos])}))
        self.vocab_size: int = 1 + max(tokenizer.get_vocab().values())  # its length is less where ids have gaps
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.special_tokens: dict[str, int] = dict(special)
        self.chat_template: str | None = tokenizer.chat_template

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            return self.text_ids(without_template(messages, self._name))
        return tuple(apply_template(self._tokenizer, messages, self._template_origin, tokenize=True))

    def conversation_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            return self.text_ids(without_template(messages, self._name) + answer)
        whole = with_answer(messages, answer)
        return tuple(apply_template(self._tokenizer, whole, self._template_origin, tokenize=True, answered=True))

    def text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def continuation_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelling(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))


def load_hugging_face(
    folder: Path, key: str, stops: Sequence[int], template: tuple[str, str] | None
) -> HuggingFaceTokenizer:
    """The tokenizer in `folder`, which the recipe names under `key`. Raises DataError."""
    from transformers import AutoTokenizer  # seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:197] + "..."
        raise DataError(
            f"{key}={folder} holds no tokenizer that transformers can load ({reason}); "
            "put tokenizer.json and tokenizer_config.json there, or tokenizer.model"
        ) from None
    return HuggingFaceTokenizer(tokenizer, str(folder), stops, template)
