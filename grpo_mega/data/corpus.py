"""All rows of a recipe: the training sources, and what is kept out of them for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grpo_mega.config import DataConfig
from grpo_mega.data.mixture import shuffled
from grpo_mega.data.rows import Row, problem
from grpo_mega.data.sources import Source, sources_of
from grpo_mega.errors import DataError


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What is left of one source to train on. `held_out` of its rows are not in it: their problem is held out."""

    source: Source
    rows: tuple[Row, ...]
    held_out: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training rows by source, in the recipe's order, and held-out rows, of which no training row has the problem."""

    training: tuple[TrainingRows, ...]
    heldout: tuple[Row, ...]
    heldout_source: str | None = None  # the held-out source's name, if it has one of its own

    def rows(self) -> Iterator[Row]:
        """Every row, training first."""
        for part in self.training:
            yield from part.rows
        yield from self.heldout


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read and split the recipe's data section.

    Held out are the first `config.heldout` distinct problems, in an order shuffled by `seed`, one row each: of the
    held-out source if there is one (all of it, where it has fewer), otherwise of all training sources together. No
    training row has a held-out text (one-digit sums repeat a lot), nor any text of a held-out source, asked for or not:
    such rows are dropped and counted, because a large corpus often holds a few problems of the test set, and dropping
    them is what a user would do by hand. Repeated texts within the training rows stay.

    Raises DataError naming the file and line (or the task), the value found and the remedy.
    """
    sources, heldout_source = sources_of(config)
    loaded = [source.rows(seed) for source in sources]
    pool = [row for rows in loaded for row in rows] if heldout_source is None else heldout_source.rows(seed)
    heldout, distinct = _held_out(config, seed, pool, [source.name for source in sources])
    kept_out = set(map(problem, heldout)) if heldout_source is None else distinct.keys()
    training = []
    for source, rows in zip(sources, loaded, strict=True):
        left = tuple(row for row in rows if problem(row) not in kept_out)
        if not left:
            raise DataError(
                f"every one of the {len(rows)} rows of {source.name} has a held-out prompt, which leaves none to train "
                "on; hold out fewer (data.heldout), or give other data"
            )
        training.append(TrainingRows(source, left, len(rows) - len(left)))
    name = None if heldout_source is None else heldout_source.name
    return Corpus(tuple(training), tuple(heldout), name)


def load_heldout(config: DataConfig, seed: int) -> tuple[tuple[Row, ...], str]:
    """The held-out rows that `load_corpus` would have, and a name for them; of a held-out source nothing else is read.

    Raises DataError, also where nothing is held out.
    """
    sources, heldout_source = sources_of(config)
    if not config.heldout:
        raise DataError("data.heldout=0 leaves no problem to evaluate on; set data.heldout")
    if heldout_source is not None:
        rows = heldout_source.rows(seed)
        return tuple(_held_out(config, seed, rows, [heldout_source.name])[0]), heldout_source.name
    names = [source.name for source in sources]
    rows = [row for source in sources for row in source.rows(seed)]
    return tuple(_held_out(config, seed, rows, names)[0]), ", ".join(names)


def _held_out(
    config: DataConfig, seed: int, pool: Sequence[Row], names: Sequence[str]
) -> tuple[list[Row], dict[str, Row]]:
    """The rows of `pool` that are held out, and its first row of each distinct problem. names: of the pool's sources.

    Raises DataError where a pool that is trained on too would be held out as a whole.
    """
    distinct: dict[str, Row] = {}
    for row in pool:
        distinct.setdefault(problem(row), row)
    if config.heldout_source is None and config.heldout >= len(distinct):
        raise DataError(
            f"data.heldout={config.heldout} takes every one of the {len(distinct)} distinct prompts of "
            f"{', '.join(names)} ({len(pool)} rows) and leaves none to train on; use "
            f"data.heldout={len(distinct) // 10} or give more data"
        )
    candidates = list(distinct.values())
    return [candidates[i] for i in shuffled(len(candidates), "heldout", seed)[: config.heldout]], distinct
