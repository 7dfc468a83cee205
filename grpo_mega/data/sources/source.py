"""One source of the recipe, and its rows."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config import DataConfig, PlaceConfig
from grpo_mega.data.rows import Fields, Row
from grpo_mega.data.sources.folder import read_folder
from grpo_mega.data.sources.jsonl import read_jsonl
from grpo_mega.data.sources.parquet import read_parquet
from grpo_mega.data.sources.tasks import read_task


@dataclass(frozen=True, slots=True)
class Source:
    """A place of the recipe's data section with its weight in the mixture and the fields that are read."""

    place: PlaceConfig
    fields: Fields
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What messages call it: the path or the task, with the split that was asked for."""
        place = self.place
        name = place.jsonl or place.parquet or place.dataset or place.reasoning_gym
        return f"{name}[{place.split}]" if place.split else str(name)

    def rows(self, seed: int) -> list[Row]:
        """All rows, in the source's order; at least one. `seed` decides what a reasoning-gym task asks.

        Raises DataError naming the file and line or row (or the task), the value found and the remedy.
        """
        place, fields = self.place, self.fields
        if place.jsonl is not None:
            return read_jsonl(place.jsonl, fields, f"{fields.key}.jsonl")
        if place.parquet is not None:
            return read_parquet(place.parquet, fields, f"{fields.key}.parquet")
        if place.dataset is not None:
            return read_folder(place.dataset, place.split, fields)
        assert place.reasoning_gym is not None  # PlaceConfig asks for exactly one
        return read_task(place.reasoning_gym, place.task, seed, fields.key)


def sources_of(config: DataConfig) -> tuple[tuple[Source, ...], Source | None]:
    """The training sources in the recipe's order (none where it only evaluates), and the held-out source if any."""

    def fields(key: str, prompt: str | None, answer: str | None) -> Fields:
        return Fields(prompt or config.prompt_field, answer or config.answer_field, key)

    heldout = config.heldout_source
    training = [
        Source(entry, fields(f"data.sources.{i}", entry.prompt_field, entry.answer_field), entry.weight)
        for i, entry in enumerate(config.sources)
    ]
    if not training and config.trains:
        training.append(Source(config, fields("data", None, None)))
    if heldout is None:
        return tuple(training), None
    of_heldout = fields("data.heldout_source", heldout.prompt_field, heldout.answer_field)
    return tuple(training), Source(heldout, of_heldout)
