"""Prompts: rows as they are put to the policy, checked for length, and what that left of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_mega.config import DataConfig
from grpo_mega.data.corpus import Corpus
from grpo_mega.data.demonstrations import demonstration
from grpo_mega.data.mixture import PromptStream
from grpo_mega.data.rows import Message, Row
from grpo_mega.data.tokenizer import ChatTokenizer
from grpo_mega.errors import ConfigError, DataError
from grpo_mega.types import Completion, Prompt


class Renderer:
    """Row -> Prompt: the instruction around the row's text, the chat template around that, and the length checked.

    A prompt may have data.max_prompt_tokens tokens, and never more than the context leaves beside a completion of
    `max_completion_tokens`. Given `stops`, the tokens at which sampling stops, prompts carry demonstrations, each at
    most as long as a completion. Raises ConfigError at construction when that leaves no token, or when
    max_prompt_tokens asks for more.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: ChatTokenizer,
        max_completion_tokens: int,
        context_length: int,
        key: str = "sampling.max_completion_tokens",
        *,
        stops: Sequence[int] | None = None,
    ) -> None:
        """key: where the recipe says `max_completion_tokens`."""
        self._config, self._tokenizer, self.overlong = config, tokenizer, config.overlong
        self._completion, self._context, self.key = max_completion_tokens, context_length, key
        self._stops = stops
        left = context_length - max_completion_tokens
        if left < 1:
            raise ConfigError(
                f"{key}={max_completion_tokens} leaves no room for a prompt in a context of {context_length}; lower it"
            )
        if config.max_prompt_tokens is not None and config.max_prompt_tokens > left:
            raise ConfigError(
                f"data.max_prompt_tokens={config.max_prompt_tokens} and {key}={max_completion_tokens} exceed a context "
                f"of {context_length}; use data.max_prompt_tokens={left}, or leave it out"
            )
        self.limit = config.max_prompt_tokens or left
        self.limits = f"{self.limit} tokens"  # in words
        if stops is not None:
            self.limits += f", or a demonstration of more than {max_completion_tokens},"

    def __call__(self, row: Row, index: int) -> tuple[Prompt | None, bool]:
        """The prompt, and whether it was over-long: then it is None under data.overlong=skip, and its last `limit`
        tokens under truncate_left (what the template puts first, a system message say, goes first). A demonstration is
        never cut: an over-long one makes its prompt None under `skip`, and is refused otherwise.

        Raises DataError naming the row when the prompt is over-long under `refuse`, has no tokens, or has no place in
        the chat template, and what `demonstration` raises.
        """
        messages, text = self._messages(row)
        try:
            token_ids = self._tokenizer.prompt_ids(messages)
            shown = self._shown(row, messages, token_ids)
        except DataError as error:
            raise DataError(f"{row['origin']}: {error}") from None
        if not token_ids:
            raise DataError(f"{row['origin']}: {text!r} has no tokens to go on from; remove the row")
        overlong = len(token_ids) > self.limit
        if overlong and self.overlong == "refuse":
            raise DataError(f"{row['origin']}: {self._refusal(len(token_ids))}")
        too_much = shown is not None and len(shown.token_ids) > self._completion
        if (overlong or too_much) and self.overlong == "skip":
            return None, True
        if shown is not None and too_much:
            raise DataError(
                f"{row['origin']}: the demonstration has {len(shown.token_ids)} tokens, the stop token among them, "
                f"more than {self.key}={self._completion}; remove the row, raise that limit, or set data.overlong to "
                "skip"
            )
        prompt = Prompt(
            index=index,
            text=text,
            token_ids=token_ids[-self.limit :],
            answer=row["answer"],
            row=row["fields"],
            messages=tuple(messages),
            demonstration=shown,
        )
        return prompt, overlong

    def _shown(self, row: Row, messages: Sequence[Message], token_ids: Sequence[int]) -> Completion | None:
        if self._stops is None:
            return None
        assert row["demonstration"] is not None, "sources read them where a recipe trains on them"
        return demonstration(self._tokenizer, messages, token_ids, row["demonstration"], self._stops)

    def _messages(self, row: Row) -> tuple[list[Message], str]:
        """The conversation, and its last user message: there data.instruction surrounds what the row says."""
        # replace, not format: instructions and prompts are full of braces (LaTeX, JSON)
        text = self._config.instruction.replace("{prompt}", row["prompt"])
        messages: list[Message] = list(row["messages"] or [{"role": "user"}])
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last] = {**messages[last], "content": text}
        if self._config.system is not None:
            if any(message["role"] == "system" for message in messages):
                raise DataError(
                    f"{row['origin']}: the row has a system message, and so has the recipe (data.system="
                    f"{self._config.system!r}); leave one of them out"
                )
            messages.insert(0, {"role": "system", "content": self._config.system})
        return messages, text

    def _refusal(self, tokens: int) -> str:
        policies = "or set data.overlong to skip or truncate_left"
        if self._config.max_prompt_tokens is not None:
            return (
                f"the prompt has {tokens} tokens, more than data.max_prompt_tokens={self.limit}; remove the row, raise "
                f"the limit, {policies}"
            )
        left = self._context - tokens
        lower = f" lower {self.key} to {left}," if left > 0 else ""
        return (
            f"the prompt has {tokens} tokens, with {self.key}={self._completion} too many for a "
            f"context of {self._context}; remove the row,{lower} {policies}"
        )


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What became of one source's rows. `share` of all training prompts come from it; None for held-out problems."""

    name: str
    share: float | None
    prompts: int
    overlong: int = 0  # skipped, or truncated
    held_out: int = 0  # training rows dropped because their problem is held out


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What became of all rows, for a person to read and for records to keep."""

    overlong: str  # the policy: refuse, skip or truncate_left
    training: tuple[SourceCounts, ...]
    heldout: SourceCounts

    def record(self) -> dict[str, Any]:
        """Totals that a record can hold: prompts trained on, held out, and over-long of both."""
        every = (*self.training, self.heldout)
        return {
            "training_prompts": sum(counts.prompts for counts in self.training),
            "heldout_prompts": self.heldout.prompts,
            "overlong_prompts": sum(counts.overlong for counts in every),
            "training_rows_held_out": sum(counts.held_out for counts in self.training),
        }

    def lines(self) -> list[str]:
        """A line a source: "data: train.jsonl: 7400 prompts, 3 over-long skipped; share 0.75"."""
        lines = [f"data: {self._line(counts)}" for counts in self.training]
        return [*lines, f"held out {self._line(self.heldout)}"] if self.heldout.prompts else lines

    def _line(self, counts: SourceCounts) -> str:
        words = [f"{counts.name}: {counts.prompts} prompts"]
        if counts.overlong:
            done = "skipped" if self.overlong == "skip" else "truncated on the left"
            words.append(f"{counts.overlong} over-long {done}")
        if counts.held_out:
            words.append(f"{counts.held_out} rows with a held-out prompt left out")
        share = "" if counts.share is None or len(self.training) == 1 else f"; share {counts.share:.4g}"
        return ", ".join(words) + share


def prompts_of(
    corpus: Corpus, render: Renderer, *, seed: int, render_heldout: Renderer | None = None
) -> tuple[PromptStream, list[Prompt], DataCounts]:
    """The training stream, the held-out prompts, and the counts of both; every row is rendered, and so checked.

    render_heldout: what renders held-out rows (which need no demonstrations, and may have a length limit of their
    own); default: as training's.
    Held-out prompts have the indices -1, -2, ...: no training prompt draws the same sampling noise.
    Raises DataError when a source has over-long prompts only, and what `render` raises.
    """
    weights = [part.source.weight for part in corpus.training]
    streams, counts = [], []
    for part, weight in zip(corpus.training, weights, strict=True):
        prompts, too_long = _rendered(part.rows, render, part.source.name)
        streams.append(prompts)
        counts.append(SourceCounts(part.source.name, weight / sum(weights), len(prompts), too_long, part.held_out))
    heldout, of_heldout = heldout_prompts(corpus.heldout, render_heldout or render, corpus.heldout_source)
    stream = PromptStream(streams, seed=seed, weights=weights)
    return stream, heldout, DataCounts(render.overlong, tuple(counts), of_heldout)


def heldout_prompts(rows: Sequence[Row], render: Renderer, name: str | None) -> tuple[list[Prompt], SourceCounts]:
    """Held-out rows as prompts with the indices -1, -2, ..., and their counts. name: of a source of their own."""
    prompts, too_long = _rendered(rows, render, name or "the held-out rows")
    indexed = [replace(prompt, index=-1 - i) for i, prompt in enumerate(prompts)]
    return indexed, SourceCounts(name or "of these", None, len(indexed), too_long)


def _rendered(rows: Iterable[Row], render: Renderer, name: str) -> tuple[list[Prompt], int]:
    """The rows' prompts, and how many were over-long."""
    pairs = [render(row, 0) for row in rows]
    prompts = [prompt for prompt, _ in pairs if prompt is not None]
    if pairs and not prompts:
        raise DataError(
            f"every prompt of {name} ({len(pairs)} rows) has more than {render.limits} and is skipped; raise "
            f"data.max_prompt_tokens, lower {render.key}, or set data.overlong=truncate_left"
        )
    return prompts, sum(overlong for _, overlong in pairs)
