"""Reward models that learn while the policy does: DeepSeekMath, arXiv:2402.03300, algorithm 1.

Each outer iteration ends with a "continuous training" of the reward model "using a replay mechanism". Before every
`train.every` steps it is trained, by label loss, on the completions of the steps since, as the part `train.labels` (a
verifier, say) judged them, mixed with a share `train.replay` of earlier iterations' completions (section 4.1.3: 10 %).

Where the paper is silent: each completion is seen once; the replayed ones are drawn without repetition, uniformly from
all steps before, by seed; AdamW begins anew each time, so that a reward model is its weights and nothing else. It is
trained in float32 under the layout that it scores in, whatever the dtype of that, and written as a Hugging Face folder,
run.directory/reward_models/NAME/step_N, from which it is read again, by a run that resumes too.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from grpo_mega.config.recipe import OptimizerConfig
from grpo_mega.config.reward_model import ContinualConfig
from grpo_mega.data.conversations import Reader, Reading
from grpo_mega.data.mixture import shuffled
from grpo_mega.errors import CheckpointError, DataError, GrpoMegaError, RewardError, RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.model.build import build_model
from grpo_mega.model.families import read_scored
from grpo_mega.objective.reward_model import label_loss
from grpo_mega.parallel import collectives
from grpo_mega.trainer.heads import ScoreHead
from grpo_mega.trainer.policy import Policy, Tick
from grpo_mega.trainer.records import raise_together, write_together, writing
from grpo_mega.trainer.reward_model import RewardModel
from grpo_mega.trainer.reward_training import RewardTrainer
from grpo_mega.trainer.setup import Run
from grpo_mega.types import Metrics, add_metrics


@dataclass(frozen=True)
class Judged:
    """A completion of an earlier step, as a rollout file has it. prompt: (step, the prompt's index in the stream)."""

    prompt: tuple[int, int]
    messages: tuple[dict, ...]
    text: str
    label: float


def train_reward_models(run: Run, step: int) -> None:
    """Train those whose outer iteration begins before step `step` (the first is 0). Every rank must call.

    Raises RewardError, on every rank, where what a part gave is no label.
    """
    for name, model in run.reward_models.items():
        rule = model.judge.config.train
        if rule is None or step == 0 or step % rule.every:
            continue
        with run.progress.task(f"training the reward model {name}", f" after {step} steps") as task:
            new, old = _judged(run, rule, step)
            readings, labels = _read([*new, *old], model.judge.reader)
            folder = _folder(run, name) / f"step_{step}"
            metrics = _train(model, rule, readings, labels, folder, (run.recipe.run.seed, step), run.progress.tick)
            write_together(run.mesh, partial(_forget, run, name, rule.every, step))
            model.load(folder)
            values: dict[str, float] = {"completions": len(readings), "replayed": len(old)}
            values |= {key: metrics[key].value() for key in ("loss", "accuracy", "margin") if key in metrics}
            task.result = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        write_together(run.mesh, partial(run.inputs.directory.write_reward_model, step, name, values))


def restore_reward_models(run: Run, step: int) -> None:
    """The reward models of the iteration that a resumed run is in, `step` steps being done. Every rank must call.

    Raises CheckpointError if one is no longer there.
    """
    for name, model in run.reward_models.items():
        rule = model.judge.config.train
        began = 0 if rule is None else _iteration(step, rule.every)
        if began == 0:
            continue
        folder = _folder(run, name) / f"step_{began}"
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}, the reward model as it was after {began} steps, is not there; restore it, or go on from "
                "another checkpoint"
            )
        model.load(folder)


def _iteration(step: int, every: int) -> int:
    """When the reward model was last trained, `step` steps being done: at a boundary it is about to be, once more."""
    return max(0, step - 1) // every * every


def _judged(run: Run, rule: ContinualConfig, step: int) -> tuple[list[Judged], list[Judged]]:
    """(the last iteration's completions, the replayed ones), on every rank as the writing one reads them."""
    found, folder = None, run.inputs.directory.path / "rollouts"
    failure: GrpoMegaError | None = None
    if run.mesh.is_writer:
        try:
            new = [row for n in range(step - rule.every, step) for row in _rows(folder, n + 1, rule.labels)]
            before = [(n, k) for n in range(step - rule.every) for k in range(_count(folder, n + 1))]
            wanted = min(len(before), round(len(new) * rule.replay / (1 - rule.replay)))
            chosen = sorted(shuffled(len(before), "replay", run.recipe.run.seed, step)[:wanted])
            found = new, _chosen(folder, [before[i] for i in chosen], rule.labels)
        except RewardError as error:
            failure = error
        except (OSError, pa.ArrowException) as error:
            failure = CheckpointError(
                f"{folder}, which reward models learn from, cannot be read ({' '.join(str(error).split())[:200]}); "
                "restore its files, or leave reward_models.*.train out"
            )
    raise_together(run.mesh, failure)
    return collectives.broadcast_object(found, run.mesh.world.group)


def _chosen(folder: Path, places: Sequence[tuple[int, int]], labels: str) -> list[Judged]:
    """Completions by (step from 0, place in its file), ascending; those without a label are left out."""
    wanted: dict[int, set[int]] = {}
    for step, place in places:
        wanted.setdefault(step, set()).add(place)
    return [row for step, several in wanted.items() for row in _rows(folder, step + 1, labels, several)]


def _rows(folder: Path, step: int, labels: str, places: set[int] | None = None) -> list[Judged]:
    """A step's completions (those at `places`) that the part judged. Raises RewardError for what is no label."""
    import pyarrow.parquet as pq

    columns = ["prompt_index", "messages", "text", "rewards"]
    found = []
    for place, row in enumerate(pq.read_table(_file(folder, step), columns=columns).to_pylist()):
        value = next((part["value"] for part in row["rewards"] if part["name"] == labels), None)
        if value is None or (places is not None and place not in places):
            continue
        if not 0 <= value <= 1:
            raise RewardError(
                f"the part {labels} gave {value} for a completion of step {step}, and train.labels reads its values as "
                "labels from 0 to 1; name a part that gives those"
            )
        messages = tuple(json.loads(row["messages"]))
        found.append(Judged((step, row["prompt_index"]), messages, row["text"], value))
    return found


def _count(folder: Path, step: int) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(_file(folder, step)).num_rows


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.parquet"


def _read(rows: Sequence[Judged], reader: Reader) -> tuple[list[tuple[int, Reading]], list[float]]:
    """Readings, one prompt's completions as a group, and their labels; what the model cannot read, it did not score."""
    groups: dict[tuple[int, int], int] = {}
    readings, labels = list[tuple[int, Reading]](), list[float]()
    for row in rows:
        try:
            reading = reader.whole(row.messages, row.text)
        except DataError:
            continue
        readings.append((groups.setdefault(row.prompt, len(groups)), reading))
        labels.append(row.label)
    return readings, labels


def _train(
    model: RewardModel,
    rule: ContinualConfig,
    readings: Sequence[tuple[int, Reading]],
    labels: Sequence[float],
    destination: Path,
    key: tuple[int, int],
    tick: Tick,
) -> Metrics:
    """Once through the readings from the model's present folder on, in an order that `key` decides; the result is
    written to `destination`."""
    arch, size = read_scored(model.folder), rule.examples_per_step
    order = shuffled(len(readings), "reward model", *key)
    metrics: Metrics = {}
    with model.own.active():
        parts = build_model(arch, model.own, model.layout, dtype=torch.float32)
        policy = Policy(ScoreHead(parts, model.own), OptimizerConfig(lr=rule.lr), max(1, -(-len(order) // size)))
        trainer = RewardTrainer(policy, arch, model.capacity)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            loss = partial(label_loss, labels=torch.tensor([labels[i] for i in chosen], dtype=torch.float64))
            policy.begin_step()
            metrics = add_metrics(metrics, trainer.update([readings[i] for i in chosen], loss, tick))
        failure = None
        try:
            bridge.export(policy.settled(), arch, model.own, model.layers, destination)
        except RunDirectoryError as error:  # which the writer alone knows of
            failure = error
        raise_together(model.own, failure)
    del parts, policy, trainer
    gc.collect()  # gradient buffers and their hooks hold each other
    return metrics


def _folder(run: Run, name: str) -> Path:
    return run.inputs.directory.path / "reward_models" / name


def _forget(run: Run, name: str, every: int, step: int) -> None:
    """Delete what neither this run nor any of its checkpoints would go on with."""
    saved = (path.name.removeprefix("step_") for path in run.inputs.directory.checkpoints.glob("step_*"))
    needed = {step, *(_iteration(int(number), every) for number in saved if number.isdigit())}
    with writing(_folder(run, name)):
        for folder in _folder(run, name).glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdigit() and int(number) not in needed:
                shutil.rmtree(folder, ignore_errors=True)
