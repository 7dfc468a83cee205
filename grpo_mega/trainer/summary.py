"""`grpo-mega report RUN_DIR`: a run's records, read by a person in a terminal. Needs neither torch nor megatron."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from grpo_mega.config import Recipe, load_recipe
from grpo_mega.config.loading import load_as
from grpo_mega.config.reward_training import RewardRecipe
from grpo_mega.errors import ConfigError
from grpo_mega.trainer.lines import bracketed, one_line, read_lines
from grpo_mega.trainer.live import sparkline
from grpo_mega.trainer.progress import GOALS, METRICS

CURVE_ROWS = 12  # of the learning curve's table; each is the mean of equally many steps
SPARK_STEPS = 60
EVALUATIONS = 6  # whose numbers are shown
CURVE = METRICS | {"completion_tokens": ("tokens", ".1f"), "truncated": ("cut", ".2f")}
PHASES = ("sample", "reward", "gather", "log-probs", "update")


def print_summary(directory: Path, console: Console) -> None:
    """Print what the run directory holds. Raises ConfigError for a path that is none.

    Lines that are cut short (the run was killed while it wrote, or writes now) are passed over, and counted aloud.
    """
    recipe = _recipe(directory)
    files = {name: read_lines(directory / f"{name}.jsonl") for name in ("metrics", "timings", "evaluations")}
    metrics, timings, evaluations = (records for records, _ in files.values())
    done = metrics[-1]["step"] if metrics else 0

    def say(text: str = "") -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    say(f"{directory}: {done} of {recipe.run.num_steps} steps")
    for name, (_, broken) in files.items():
        if broken:
            say(f"{name}.jsonl: {broken} lines are no whole record (the run was ended while it wrote); passed over")
    for section, keys in recipe.model_dump(exclude_defaults=True, exclude={"run": {"directory"}}).items():
        say(
            f"  {section:<10} "
            + "  ".join(f"{key}={value if value != '' else repr('')}" for key, value in keys.items())
        )
    say()
    if metrics:
        console.print(_curve(metrics))
        if not console.options.ascii_only:
            goal = next(name for name in GOALS if name in metrics[0])
            values = [row[goal] for row in metrics[-SPARK_STEPS:] if row.get(goal) is not None]
            say(f"{goal}, the last {SPARK_STEPS} steps: {sparkline(values)}")
        if errors := sum(row.get("reward_errors", 0) for row in metrics):
            say(f"completions whose reward failed: {errors:g}")
    else:
        say("no step is recorded yet")
    if evaluations:
        say("held-out problems after so many steps (in brackets 95 % intervals):")
        say("\n".join(_evaluations(evaluations)))
    if timings:
        say("\n".join(costs(timings)))
    for line in _completions(directory):
        say(line)


def medians(timings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the steps of timings.jsonl.

    Seconds of each phase and of the "step"; CPU seconds ("cpu"); completion tokens a second of "sampling", of
    "training" (log-probs and update) and of the whole step ("tokens"); the largest peak memory of a rank, GiB
    ("memory"). nan where nothing is recorded.
    """
    keys = {name: f"{name}_s" for name in ("step", "cpu", *PHASES)}
    keys |= {"tokens": "tokens_per_s", **{kind: f"{kind}_tokens_per_s" for kind in ("sampling", "training")}}
    result = {
        name: statistics.median([row[key] for row in timings if key in row] or [math.nan]) for name, key in keys.items()
    }
    return result | {"memory": max(row["peak_memory_bytes_a_rank"] for row in timings) / 2**30}


def costs(timings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The medians in words; phases that take no time are left out."""
    median = medians(timings)
    sampling = "" if math.isnan(median["sampling"]) else f" sampling alone {median['sampling']:.0f},"
    phases = ", ".join(f"{phase} {median[phase]:.1f}" for phase in PHASES if median[phase] >= 0.05)
    return [
        f"a step took {median['step']:.1f} s (medians of {len(timings)}): {phases}",
        f"completion tokens a second: {median['tokens']:.0f};{sampling} log-probs and update {median['training']:.0f}",
        f"CPU time of a step {median['cpu']:.1f} s; peak memory a rank {median['memory']:.2f} GiB",
    ]


def _recipe(directory: Path) -> Recipe | RewardRecipe:
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise ConfigError(f"{directory} {found}; give a run directory (run.directory of its recipe)")
    if not (directory / "recipe.yaml").is_file():
        raise ConfigError(f"{directory} is no run directory: it holds no recipe.yaml; give run.directory of a recipe")
    try:
        return load_recipe(directory / "recipe.yaml")
    except ConfigError:
        try:
            return load_as(RewardRecipe, directory / "recipe.yaml")
        except ConfigError:
            pass
        raise


def _curve(metrics: Sequence[Mapping[str, Any]]) -> Table:
    """A row a step, or the means of equally many steps a row."""
    names = [name for name in (*CURVE, *_parts(metrics)) if any(row.get(name) is not None for row in metrics)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("steps", justify="right")
    for name in names:
        table.add_column(CURVE.get(name, (name.removeprefix("reward/"),))[0], justify="right")
    a_row = -(-len(metrics) // CURVE_ROWS)
    for start in range(0, len(metrics), a_row):
        part = metrics[start : start + a_row]
        first, last = part[0]["step"], part[-1]["step"]
        cells = []
        for name in names:
            values = [row[name] for row in part if row.get(name) is not None]
            form = CURVE.get(name, ("", ".3f"))[1]
            cells.append(f"{statistics.fmean(values):{form}}" if values else "-")
        table.add_row(f"{first}" if first == last else f"{first}-{last}", *cells)
    return table


def _evaluations(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a metric: the first evaluation, and the last ones where there are more than EVALUATIONS."""
    records = records if len(records) <= EVALUATIONS else [records[0], *records[1 - EVALUATIONS :]]
    names = ["reward", *dict.fromkeys(name for row in records for name in row if re.fullmatch(r"(pass|maj)@\d+", name))]
    for name in names:
        cells = []
        for row in (row for row in records if row.get(name) is not None):
            ends = (row.get(f"{name}_{end}") for end in ("low", "high"))
            low, high = (math.nan if end is None else end for end in ends)
            cells.append(f"{bracketed(row[name], low, high)} after {row['step']}")
        yield f"  {name:<{max(map(len, names))}}  {', '.join(cells)}"


def _parts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics of the reward's parts: reward/NAME."""
    return sorted({name for row in metrics for name in row if name.startswith("reward/")})


def _completions(directory: Path) -> Iterator[str]:
    """Best and worst completion of the last step that has rollouts; of demonstrations the first and the last."""
    files = sorted((directory / "rollouts").glob("step_*.parquet"))
    if not files:
        return
    try:
        rows = pq.read_table(files[-1]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        yield f"{files[-1]} cannot be read ({one_line(str(error))})"
        return
    yield f"\nlast rollouts: {files[-1]}, {len(rows)} completions"
    rows.sort(key=lambda row: -row["reward"])  # stable: among equals the first in the step's order
    drawn = not rows or rows[0]["sampler_logprobs"] is not None  # else they are demonstrations, of no reward
    for name, row in (
        zip(("best", "worst") if drawn else ("first", "last"), (rows[0], rows[-1]), strict=True) if rows else ()
    ):
        parts = ", ".join(_part(part["name"], part["value"]) for part in row["rewards"])
        why = f"; error: {one_line(row['error'])}" if row["error"] else ""
        yield (
            f"  {name}: "
            + (f"reward {row['reward']:g}{f' ({parts})' if parts else ''}, {_advantage(row)}, " if drawn else "")
            + f"{len(row['token_ids'])} tokens, {row['finish_reason']}{why}"
        )
        answer = f"   (answer {one_line(row['answer'])})" if row["answer"] is not None else ""
        yield f"    prompt      {one_line(row['prompt'])}{answer}"
        yield f"    completion  {one_line(row['text'], 300)}"


def _advantage(row: Mapping[str, Any]) -> str:
    return "not trained on" if row["advantage"] is None else f"advantage {row['advantage']:+.2f}"


def _part(name: str, value: float | None) -> str:
    return f"{name} failed" if value is None else f"{name} {value:g}"
