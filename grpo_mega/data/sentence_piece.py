"""A sentencepiece model (tokenizer.model) with a chat template: sentencepiece's own ids, exactly.

sentencepiece never reads a control piece (<s>, [INST]) from text: it spells it out in ordinary pieces. A chat template
writes control pieces as text. So a rendered template is cut at them: each becomes its id, and what stands between is
encoded by sentencepiece. Those that a message's content spells are marked before rendering and stay ordinary text: a
row cannot end its own turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo_mega.data.chat_template import apply_template, with_answer, without_template
from grpo_mega.data.rows import Message
from grpo_mega.errors import DataError

# a noncharacter: no text has it (one that does is refused), and sentencepiece never sees it
MARK = "\ufdd0"


class SentencePieceTokenizer:
    """See ChatTokenizer. Special tokens spelled out in a message stay text.

    Without a chat template, the model's beginning of sequence precedes the text unless add_bos_token is false in
    tokenizer_config.json; a template writes its own ({{ bos_token }}).

    Text between special tokens is encoded as a text of its own, which sentencepiece prefixes by a space, as Llama's and
    Mistral's own code does: a template for those writes no space after [INST]. With `legacy: false` in
    tokenizer_config.json, a folder of transformers' whose template does write it, only the beginning of a prompt is
    prefixed.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        settings: Mapping[str, Any],
        more_stop_token_ids: Sequence[int],
        template: tuple[str, str] | None,
    ) -> None:
        """settings: tokenizer_config.json's. template: the chat template and where it is from. Raises DataError."""
        self._model, self._name, self._pieces = model, name, _processor(model, name)
        size = self._pieces.vocab_size()
        added = _added_tokens(settings, name)
        self._special = {self._pieces.id_to_piece(i): i for i in range(size) if self._pieces.is_control(i)}
        self._written = {i: text for text, (i, special) in added.items() if not special and i >= size}
        self._special |= {text: i for text, (i, special) in added.items() if special or i >= size}
        self._silent = set(self._special.values()) - self._written.keys()
        self._cut = _any_of(self._special)
        # what a message must not spell; a token of one character cannot be marked
        self._forged = _any_of(text for text, i in self._special.items() if i in self._silent and len(text) > 1)
        self.vocab_size: int = max([size, *(i + 1 for i, _ in added.values())])
        self._bos = self._token(settings, "bos_token", self._pieces.bos_id())
        eos = self.end_token_id = self._token(settings, "eos_token", self._pieces.eos_id())
        self._adds_bos = settings.get("add_bos_token") is not False
        self._prefixes_all = settings.get("legacy") is not False
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({*more_stop_token_ids, *([] if eos is None else [eos])}))
        self.special_tokens: dict[str, int] = dict(self._special)
        self.chat_template = None if template is None else template[0]
        self._template_origin = "" if template is None else template[1]
        self._renderer = None if template is None else _renderer(template[0], self._text(self._bos), self._text(eos))

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if self._renderer is None:
            return self.text_ids(without_template(messages, self._name))
        return self._rendered(messages, answered=False)

    def conversation_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        if self._renderer is None:
            return self.text_ids(without_template(messages, self._name) + answer)
        return self._rendered(with_answer(messages, answer), answered=True)

    def _rendered(self, messages: Sequence[Message], *, answered: bool) -> tuple[int, ...]:
        marked = [{**message, "content": self._marked(message["content"])} for message in messages]
        text = apply_template(self._renderer, marked, self._template_origin, tokenize=False, answered=answered)
        return tuple(self._ids(text))

    def text_ids(self, text: str) -> tuple[int, ...]:
        bos = [self._bos] if self._adds_bos and self._bos is not None else []
        return (*bos, *self._ids(self._marked(text)))

    def continuation_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._without_prefix.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids beyond the vocabulary are dropped like special tokens: a model may have more rows than its tokenizer."""
        size = self._pieces.vocab_size()
        kept = [i for i in token_ids if i in self._written or (i < size and i not in self._silent)]
        parts: list[str] = []
        for added, run in groupby(kept, key=self._written.__contains__):
            if added:
                parts += [self._written[i] for i in run]
            else:
                parts.append((self._without_prefix if parts else self._pieces).decode(list(run)))
        return "".join(parts)

    def spelling(self, token_id: int) -> str:
        return str(self._written.get(token_id) or self._text(token_id) or token_id)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._cut.finditer(text):
            ids += self._encode(text[end : match.start()], first=end == 0)
            ids.append(self._special[match.group()])
            end = match.end()
        return ids + self._encode(text[end:], first=end == 0)

    def _encode(self, text: str, *, first: bool) -> list[int]:
        pieces = self._pieces if first or self._prefixes_all else self._without_prefix
        return pieces.encode(text.replace(MARK, ""))

    def _marked(self, content: str) -> str:
        """`content` with a MARK inside whatever would be taken for a special token."""
        if MARK in content:
            raise DataError(f"the prompt holds {MARK!a}, a code point that Unicode keeps out of texts; remove it")
        while self._forged.search(content):  # a mark can leave a token that overlapped the marked one
            content = self._forged.sub(lambda match: match.group()[0] + MARK + match.group()[1:], content)
        return content

    @cached_property
    def _without_prefix(self) -> Any:
        """The same model, without a space before the text (and without dropping one in front of what it decodes)."""
        from sentencepiece import sentencepiece_model_pb2 as protos

        proto = protos.ModelProto.FromString(self._model)  # type: ignore[attr-defined]
        proto.normalizer_spec.add_dummy_prefix = False
        return _processor(proto.SerializeToString(), self._name)

    def _token(self, settings: Mapping[str, Any], key: str, own: int) -> int | None:
        """The id of bos_token or eos_token: what tokenizer_config.json names, otherwise the model's own, if any."""
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return own if own >= 0 else None
        if text in self._special:
            return self._special[text]
        i = self._pieces.piece_to_id(str(text))
        if self._pieces.id_to_piece(i) != text:
            raise DataError(f"tokenizer_config.json names {key}={text!r}, which {self._name} does not have; mend it")
        return i

    def _text(self, i: int | None) -> str | None:
        if i is None or i >= self._pieces.vocab_size():
            return next((text for text, j in self._special.items() if j == i), None)
        return self._pieces.id_to_piece(i)


def load_sentence_piece(
    path: Path, settings: Mapping[str, Any], stops: Sequence[int], template: tuple[str, str] | None
) -> SentencePieceTokenizer:
    """The tokenizer in the file `path`, with the chat template given or that of the folder it lies in: DataError."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a sentencepiece model") from None
    return SentencePieceTokenizer(model, str(path), settings, stops, template or _own_template(path.parent, settings))


def _processor(model: bytes, name: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not model:
            raise RuntimeError("the file is empty")  # which sentencepiece takes for no model yet
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is no sentencepiece model ({reason}); give one, or the folder of a Hugging Face tokenizer "
            "(tokenizer.json)"
        ) from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing when there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _own_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str] | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}); save it as UTF-8") from None
    template, origin = settings.get("chat_template"), str(folder / "tokenizer_config.json")
    if isinstance(template, list):  # several, each with a name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{origin}: chat_template is not a text; mend it")
    return (template, origin) if template else None


def _added_tokens(settings: Mapping[str, Any], name: str) -> dict[str, tuple[int, bool]]:
    """tokenizer_config.json's added tokens beside the model's pieces: text -> (id, whether it is special)."""
    entries = settings.get("added_tokens_decoder") or {}
    try:
        return {entry["content"]: (int(i), bool(entry.get("special"))) for i, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"added_tokens_decoder in tokenizer_config.json beside {name} is damaged ({error!r}); mend it"
        ) from None


def _renderer(template: str, bos: str | None, eos: str | None) -> Any:
    """transformers' template machine (its sandbox, filters and functions), which comes with a tokenizer only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos)
    renderer.chat_template = template
    return renderer
