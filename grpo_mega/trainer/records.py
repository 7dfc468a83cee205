"""What a run leaves behind: the resolved recipe, metrics and timings (a JSON object a line), rollouts, curves."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mega.config import Recipe, to_yaml
from grpo_mega.config.loading import load_as
from grpo_mega.config.parallel import LAYOUT_KEYS
from grpo_mega.config.reward_training import RewardRecipe
from grpo_mega.data.balance import imbalance
from grpo_mega.errors import ConfigError, GrpoMegaError, RunDirectoryError
from grpo_mega.objective.advantages import is_degenerate
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh
from grpo_mega.trainer.lines import read_lines
from grpo_mega.types import Group, Mean, Metrics, Rollout

if TYPE_CHECKING:
    from grpo_mega.trainer.tensorboard import Scalars

# settings that a resumed run may change: where, how long and in what portions, not what a step computes
FREE_SECTIONS = ("parallel", "evaluation")
FREE_KEYS = {
    *(("run", key) for key in ("directory", "num_steps", "save_every", "evaluate_every")),
    *(("sampling", key) for key in ("max_rows", "tensor", "pipeline", "expert", "expert_tensor")),
    *(("batch", key) for key in ("tokens_per_microbatch", "fixed_rows")),
    ("model", "recompute"),
    *((section, key) for section in ("reference", "reward_models") for key in (*LAYOUT_KEYS, "offload")),
}


def group_metrics(groups: Sequence[Group]) -> Metrics:
    """What a step sampled and scored: means over completions, and three counts.

    reward/NAME, of a reward of several parts: the part's mean, before its weight, over the completions it was asked
    about and did not fail on.

    reward_errors: completions whose reward function failed. degenerate_groups: groups whose rewards are all equal, so
    that they teach nothing. near_boundary_draws: draws that rounding could have decided otherwise.

    Of demonstrations, which nobody drew or scored, there is completion_tokens alone.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    completions = [rollout.completion for rollout in rollouts]
    tokens = Mean(sum(len(completion.token_ids) for completion in completions), count)
    if not all(completion.drawn for completion in completions):
        return {"completion_tokens": tokens}
    return {
        "reward": Mean(sum(rollout.reward for rollout in rollouts), count),
        "reward_errors": Mean(sum(rollout.error is not None for rollout in rollouts), 1),
        "degenerate_groups": Mean(sum(map(is_degenerate_group, groups)), 1),
        "completion_tokens": tokens,
        "truncated": Mean(sum(completion.finish_reason == "length" for completion in completions), count),
        "near_boundary_draws": Mean(sum(completion.near_boundary for completion in completions), 1),
        **_part_metrics(rollouts),
    }


def _part_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    names = {name for rollout in rollouts for name, _ in rollout.parts}
    values = {name: [v for r in rollouts for n, v in r.parts if n == name and v is not None] for name in names}
    return {f"reward/{name}": Mean(sum(of), len(of)) for name, of in values.items()} if len(names) > 1 else {}


def is_degenerate_group(group: Group) -> bool:
    """Whether all rewards of the group (of all steps, under process supervision) are equal."""
    import torch

    steps = [value for rollout in group.rollouts for _, value in rollout.steps]
    return is_degenerate(torch.tensor(steps or [rollout.reward for rollout in group.rollouts], dtype=torch.float64))


class RunDirectory:
    """The files of a run. Only the writing rank may write; every rank may ask where things are.

    What can be written no more is a RunDirectoryError, raised before anything half-written has a name that counts.
    """

    def __init__(self, recipe: Recipe | RewardRecipe):
        self.recipe = recipe
        self.path = Path(recipe.run.directory)
        self.checkpoints = self.path / "checkpoints"
        self.hf = self.path / "hf"
        self._curves: dict[str, Scalars] = {}

    def check(self) -> None:
        """Raise ConfigError if the directory cannot be written or holds a run with other settings."""
        existing = self.path / "recipe.yaml"
        check_writable(self.path, "run.directory")
        if existing.exists():
            for change in _differences(load_as(type(self.recipe), existing).model_dump(), self.recipe.model_dump()):
                raise ConfigError(
                    f"run.directory={self.path} holds a run with {change}; use another run.directory, or go on with "
                    "the settings it began with"
                )

    def open(self, first_step: int) -> None:
        """Write the resolved recipe and drop what is recorded of steps that are about to be run again."""
        from grpo_mega.trainer import rollout_file  # noqa: F401 (half a second, which the first step need not take)
        from grpo_mega.trainer.tensorboard import Scalars

        rollouts = self.path / "rollouts"
        with writing(self.path):
            if isinstance(self.recipe, Recipe):
                rollouts.mkdir(exist_ok=True)
            replace_file(self.path / "recipe.yaml", to_yaml(self.recipe).encode())
            # a run begins with an evaluation of what it starts from, step first_step - 1
            for name, end in (
                ("metrics", first_step),
                ("timings", first_step),
                ("evaluations", first_step - 1),
                ("reward_models", first_step - 1),
            ):
                file = self.path / f"{name}.jsonl"
                if file.exists():
                    lines = [json.dumps(record) + "\n" for record in read_lines(file)[0] if record["step"] < end]
                    replace_file(file, "".join(lines).encode())
            for file in (*rollouts.glob("step_*.parquet"), *rollouts.glob("*.partial")):
                if file.suffix == ".partial" or int(file.stem.removeprefix("step_")) >= first_step:
                    file.unlink()
            self._curves = {
                "training": Scalars(self.path / "tensorboard" / "training", first_step),
                "evaluation": Scalars(self.path / "tensorboard" / "evaluation", first_step - 1),
            }

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """rollouts/step_000001.parquet: a row a completion, in the step's global order; durable when this returns."""
        from grpo_mega.trainer.rollout_file import rollout_bytes

        with writing(self.path):
            replace_file(self.path / "rollouts" / f"step_{step:06d}.parquet", rollout_bytes(step, groups))

    def write_step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """A line of metrics.jsonl (what a second run repeats bit for bit), one of timings.jsonl, and both as curves."""
        with writing(self.path):
            self._append("metrics.jsonl", {"step": step, **metrics})
            self._append("timings.jsonl", {"step": step, **timings})
            curves = {f"metrics/{name}": value for name, value in metrics.items()}
            self._curves["training"].add(step, curves | {f"timings/{name}": value for name, value in timings.items()})

    def write_heldout(self, step: int, values: Mapping[str, float]) -> None:
        """A line of evaluations.jsonl and a point of each curve; the reward's lies over that of training."""
        with writing(self.path):
            self._append("evaluations.jsonl", {"step": step, **values})
            curves = {key: value for key, value in values.items() if key not in ("problems", "completions")}
            self._curves["evaluation"].add(step, {f"metrics/{name}": value for name, value in curves.items()})

    def write_reward_model(self, steps_done: int, name: str, values: Mapping[str, float]) -> None:
        """A line of reward_models.jsonl: what a reward model learned after so many steps."""
        with writing(self.path):
            self._append("reward_models.jsonl", {"step": steps_done, "model": name, **values})
            self._curves["training"].add(steps_done, {f"{name}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Every line is on disk already: what remains is to let go of the curves' files."""
        while self._curves:
            self._curves.popitem()[1].close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """A line more; a mean of nothing (nan: no token was trained) is null, since JSON knows no nan."""
        record = {key: None if value != value else value for key, value in record.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def check_writable(path: Path, said: str) -> None:
    """Make the directory that a user names by `said`. Raises ConfigError unless files can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:  # permission bits say little about a network's folder
            file.write(b"x")
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise ConfigError(f"{said}={path} cannot be used ({reason}); choose another") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into the RunDirectoryError about `path`."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error.strerror or " ".join(str(error).split())) from error


def unwritable(path: Path, reason: str) -> RunDirectoryError:
    """The sentence for a run directory that failed while the run went on."""
    return RunDirectoryError(
        f"{path} can be written no more ({reason}); the run stops: free space, or make the directory writable, and "
        "start the same command again: it goes on from its latest checkpoint"
    )


def write_together(mesh: Mesh, write: Callable[[], None]) -> None:
    """Let the writing rank write; if it cannot, every rank raises its RunDirectoryError, and none is left waiting.

    Every rank must call.
    """
    failure = None
    if mesh.is_writer:
        try:
            write()
        except RunDirectoryError as error:
            failure = error
    raise_together(mesh, failure)


def raise_together(mesh: Mesh, failure: GrpoMegaError | None) -> None:
    """Raise the writing rank's failure on every rank, if it had one. Every rank must call."""
    failure = collectives.broadcast_object(failure, mesh.world.group)
    if failure is not None:
        raise failure


def step_timings(
    seconds: Mapping[str, float], step_seconds: float, costs: Sequence[StepCost], tokens: int, trained: int
) -> dict[str, float]:
    """A step's line of timings.jsonl from the writing rank's stopwatch and what the step cost on every rank.

    Rates are completion tokens of all ranks a second: of the slowest rank's sampling (none where nothing is sampled);
    of log-probs and update together (of the `trained` tokens); of the whole step. cpu_s is the CPU time of all ranks;
    evaluations and checkpoints are in none of them. What the imbalances compare is in `data/balance`; every rank of a
    replica has the same work, so they count alike.
    """
    training = seconds["log-probs"] + seconds["update"]
    by_rank, by_microbatch = imbalance([cost.work for cost in costs])
    sampling = max(cost.sample_seconds for cost in costs)
    return {
        "step_s": round(step_seconds, 3),
        **{f"{name}_s": round(spent, 3) for name, spent in seconds.items()},
        "cpu_s": round(sum(cost.cpu_seconds for cost in costs), 3),
        "completion_tokens": tokens,
        "tokens_per_s": round(tokens / step_seconds, 1),
        **({"sampling_tokens_per_s": round(tokens / sampling, 1)} if sampling else {}),
        "training_tokens_per_s": round(trained / training, 1),
        "rank_imbalance": round(by_rank, 4),
        "microbatch_imbalance": round(by_microbatch, 4),
        "peak_memory_bytes_a_rank": max(cost.peak_memory_bytes for cost in costs),
    }


@dataclass(frozen=True)
class StepCost:
    """What a step cost on one rank."""

    sample_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    work: Sequence[Sequence[float]]  # of the microbatches of each minibatch, in rows


def replace_file(path: Path, content: bytes) -> None:
    """Whole or not at all, and durable when this returns."""
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # it may be what fills the disk
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for section, values in now.items():
        if section in FREE_SECTIONS:
            continue
        was, values = _flat(section, before.get(section, {})), _flat(section, values)
        for key in {**was, **values}:
            if (section, key.rpartition(".")[2]) not in FREE_KEYS and was.get(key) != values.get(key):
                found.append(f"{section}.{key}={was.get(key)!r}, this recipe says {values.get(key)!r}")
    return found


def _flat(section: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a section; of one with named entries, NAME.key."""
    if section != "reward_models":
        return values
    return {f"{name}.{key}": value for name, entry in values.items() for key, value in entry.items()}
