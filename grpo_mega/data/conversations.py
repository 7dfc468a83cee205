"""Conversations as a reward model reads them: token ids, the rows whose scores count, samples that share prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.data.rows import Message
from grpo_mega.data.tokenizer import ChatTokenizer
from grpo_mega.errors import DataError
from grpo_mega.types import Sample


@dataclass(frozen=True, slots=True)
class Reading:
    """An answered conversation in tokens, and the places [ascending] of those whose rows are scored."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """How one reward model reads. limit: the most tokens of a conversation; pad: config.json's pad_token_id, if any;
    separator: what it is given to read behind each step, one token of its tokenizer."""

    tokenizer: ChatTokenizer
    limit: int
    pad: int | None = None
    separator: str | None = None

    def whole(self, messages: Sequence[Message], answer: str) -> Reading:
        """The score of an answer is read at the last token that is no padding, as transformers' classifiers do.

        Raises DataError for a conversation that is too long, or that the tokenizer's template refuses.
        """
        ids = self._ids(messages, answer)
        last = next((place for place in reversed(range(len(ids))) if ids[place] != self.pad), 0)
        return Reading(ids[: last + 1], (last,))

    def steps(self, messages: Sequence[Message], steps: Sequence[str]) -> Reading:
        """Of a process reward model: the separator stands behind each step, whose score is read at that token.

        What comes before the answer may hold separators of its own, and so may the template behind it. An answer that
        does is refused: it would be scored at places of its own choice. Raises DataError, as `whole` too.
        """
        assert self.separator is not None
        if any(self.separator in step for step in steps):
            raise DataError(f"the completion holds the separator {self.separator!r}")
        ids = self._ids(messages, "".join(step + self.separator for step in steps))
        begin = _common_length(ids, self.tokenizer.conversation_ids(messages, ""))
        mark = separator_token(self.tokenizer, self.separator)
        places = [place for place in range(begin, len(ids)) if ids[place] == mark][: len(steps)]
        if len(places) < len(steps):
            raise DataError(
                f"{len(steps)} separators {self.separator!r} became {len(places)} tokens of their own in the "
                "conversation; use one that the tokenizer never joins with its neighbours"
            )
        return Reading(ids[: places[-1] + 1], tuple(places))

    def _ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        ids = self.tokenizer.conversation_ids(messages, answer)
        if not ids:
            raise DataError("the conversation has no tokens, so that there is nothing to score")
        if len(ids) > self.limit:
            raise DataError(f"the conversation has {len(ids)} tokens, more than the {self.limit} of the reward model")
        return ids


def separator_token(tokenizer: ChatTokenizer, separator: str) -> int:
    """The id of the one token that a separator is behind a text. Raises DataError where it is several."""
    if separator in tokenizer.special_tokens:
        return tokenizer.special_tokens[separator]
    plain, marked = tokenizer.text_ids("1"), tokenizer.text_ids("1" + separator)
    begin = _common_length(plain, marked)
    added = marked[begin : len(marked) - (len(plain) - begin)]  # special tokens may stand behind both
    if len(added) != 1:
        raise DataError(
            f"separator={separator!r} is {len(added)} tokens; use one that is a single token of the model's tokenizer, "
            "as process reward models are trained with"
        )
    return added[0]


def samples_of(readings: Sequence[tuple[int, int, Reading]]) -> list[Sample]:
    """Samples whose trained rows are those that the readings score. readings: (slot, group, reading), groups in runs.

    The row that reads a token is the one that would predict the next: a token more, which no row reads, stands at the
    end for the sake of the last one. Readings of one group share the tokens that all of them begin with, up to the
    first that is scored. `advantage` is the reading's slot, the number of its first score, by which scores are known
    again in a microbatch (exact in float32 below 2^24); those of its further places follow.
    """
    runs: dict[int, list[Reading]] = {}
    for _, group, reading in readings:
        runs.setdefault(group, []).append(reading)
    shared = {group: _common(several) for group, several in runs.items()}
    return [_sample(slot, group, reading, shared[group]) for slot, group, reading in readings]


def _common(readings: Sequence[Reading]) -> int:
    """How many tokens all of them begin with; the row of a scored token stays each one's own."""
    first = readings[0]
    length = min(reading.places[0] + 1 for reading in readings)
    return max(1, min(length, *(_common_length(first.token_ids, other.token_ids) for other in readings)))


def _common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(some), len(others)))


def _sample(slot: int, group: int, reading: Reading, prompt_tokens: int) -> Sample:
    count = len(reading.token_ids) + 1
    mask = [False] * count
    for place in reading.places:
        mask[place + 1] = True
    return Sample(
        order=slot,
        group=group,
        prompt_tokens=prompt_tokens,
        token_ids=(*reading.token_ids, 0),
        loss_mask=tuple(mask),
        sampler_logprobs=(0.0,) * count,
        advantage=float(slot),
        weight=1.0,
    )
