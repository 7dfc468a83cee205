"""What training asks of a tokenizer, and which kind a model has: Hugging Face's, or a sentencepiece model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_mega.data.hugging_face import load_hugging_face
from grpo_mega.data.rows import Message
from grpo_mega.data.sentence_piece import load_sentence_piece
from grpo_mega.errors import DataError

# tokenizer classes whose ids are the sentencepiece model's own; others (XLM-R's, T5's) shift them or add to them
PLAIN_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
BESIDE_A_MODEL = ("tokenizer_config.json", "chat_template.jinja")  # what is read beside a sentencepiece model
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *BESIDE_A_MODEL,
)


class ChatTokenizer(Protocol):
    """A tokenizer with its chat template.

    stop_token_ids: ascending; the tokenizer's end of sequence (`end_token_id`, if it has one) and what
    generation_config.json adds (end of turn).
    vocab_size: one more than the highest id it can produce, added tokens included; at most the model's vocabulary.
    special_tokens: by their role or text, what a text cannot spell.
    """

    stop_token_ids: tuple[int, ...]
    end_token_id: int | None
    vocab_size: int
    special_tokens: dict[str, int]
    chat_template: str | None

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation of {role, content}, ready for the policy to answer.

        With a chat template: whatever it makes of the messages and of an empty system message (the way to replace a
        template's own by nothing). Without one: the text of a single user message as it stands, with the special
        tokens that the tokenizer adds.
        Raises DataError when the template refuses the messages, or when there is none and they are more than one text.
        """
        ...

    def conversation_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """Token ids of a conversation that has been answered, for reward models and demonstrations.

        With a chat template: its rendering of the messages and the answer as the assistant's. Without one: the text of
        a single user message and the answer directly behind it. Raises DataError as `prompt_ids`.
        """
        ...

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it stands, with the special tokens that the tokenizer adds to one."""
        ...

    def continuation_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on from another: no special token is added, nor sentencepiece's space."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, without special tokens and without tidying of spaces."""
        ...

    def spelling(self, token_id: int) -> str:
        """The token as the tokenizer's files write it."""
        ...


def load_tokenizer(
    model: str | Path, tokenizer: str | None = None, chat_template: str | None = None, section: str = "model"
) -> ChatTokenizer:
    """The tokenizer of the recipe: model.path's, or model.tokenizer's (a folder, or a sentencepiece .model file).
    section: what the recipe calls that model.

    A folder with tokenizer.json is Hugging Face's; one with tokenizer.model alone is read by sentencepiece itself,
    because transformers' conversion of such a file gives other ids (5.23, "two  spaces" with Mistral's models).
    chat_template: a Jinja file that takes the place of the tokenizer's own template. Stop tokens are the tokenizer's,
    and those of generation_config.json beside it and in the model's folder.
    Never the network, never code from the folder. Raises DataError.
    """
    path, key = (Path(model), f"{section}.path") if tokenizer is None else (Path(tokenizer), f"{section}.tokenizer")
    template = None if chat_template is None else _read_template(Path(chat_template))
    if not path.exists() or (path.is_file() and tokenizer is None):
        either = "" if tokenizer is None else ", or a sentencepiece .model file"
        raise DataError(f"{key}={path} is no folder; give one with tokenizer.json and tokenizer_config.json{either}")
    folder = path if path.is_dir() else path.parent
    stops = sorted({*_generation_stops(folder), *_generation_stops(Path(model))})
    settings = _settings(folder)
    if path.is_file():
        return load_sentence_piece(path, settings, stops, template)
    plain = str(settings.get("tokenizer_class", PLAIN_CLASSES[0])).removesuffix("Fast") in PLAIN_CLASSES
    if plain and not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
        return load_sentence_piece(path / "tokenizer.model", settings, stops, template)
    return load_hugging_face(path, key, stops, template)


def check_vocabulary(tokenizer: ChatTokenizer, name: str, vocab_size: int) -> None:
    """Raise DataError, naming tokens, when the tokenizer has ids for which a model of `vocab_size` has no row."""
    beyond = range(vocab_size, tokenizer.vocab_size)
    if not beyond:
        return
    shown = ", ".join(f"{tokenizer.spelling(i)!r} ({i})" for i in beyond[:5])
    raise DataError(
        f"the tokenizer of {name} has {tokenizer.vocab_size} tokens and the model's embedding {vocab_size} rows: "
        f"{shown}{f' and {len(beyond) - 5} more' if len(beyond) > 5 else ''} have none; use the tokenizer that the "
        "model was made with"
    )


def export_tokenizer(destination: Path, tokenizer: str | None, chat_template: str | None) -> None:
    """Give an exported model folder the tokenizer and the template that the recipe trained it with.

    destination: a copy of model.path's folder, its own tokenizer included; with both arguments None it stays that.
    """
    if tokenizer is not None:
        source = Path(tokenizer)
        for name in TOKENIZER_FILES:
            (destination / name).unlink(missing_ok=True)
        if source.is_file():
            shutil.copy2(source, destination / "tokenizer.model")
        for name in TOKENIZER_FILES if source.is_dir() else BESIDE_A_MODEL:
            file = (source if source.is_dir() else source.parent) / name
            if file.is_file():
                shutil.copy2(file, destination / name)
    if chat_template is not None:
        shutil.copy2(chat_template, destination / "chat_template.jinja")


def _read_template(path: Path) -> tuple[str, str]:
    """The text of data.chat_template, and what messages call it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template={path} cannot be read ({error.strerror}); give a Jinja file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template={path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"data.chat_template={path} is empty; write the template, or leave the key out")
    return text, str(path)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); mend it") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds no JSON object; mend it")
    return settings


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
