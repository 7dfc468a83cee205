"""`grpo-mega reward`: one rank's whole run, from a folder and a file of judgements to a reward model's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from grpo_mega.config.reward_training import RewardRecipe
from grpo_mega.data.conversations import Reader, Reading
from grpo_mega.data.judgements import Judgement, Kind, hold_out, read_judgements
from grpo_mega.data.mixture import shuffled
from grpo_mega.data.tokenizer import check_vocabulary, export_tokenizer, load_tokenizer
from grpo_mega.errors import CheckpointError, DataError, RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.families import read_trunk
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.model.optimizer import start_main_weights
from grpo_mega.model.score import weights_for
from grpo_mega.objective.reward_model import label_loss, preference_loss
from grpo_mega.parallel import mesh
from grpo_mega.parallel.device import peak_memory_bytes
from grpo_mega.trainer import checkpoint
from grpo_mega.trainer.check import check_reward
from grpo_mega.trainer.heads import ScoreHead
from grpo_mega.trainer.policy import Policy
from grpo_mega.trainer.progress import Progress, progress_on
from grpo_mega.trainer.records import RunDirectory, raise_together, write_together, writing
from grpo_mega.trainer.reward_training import Loss, RewardTrainer


@dataclass(frozen=True)
class Example:
    """A row of the file in tokens."""

    readings: tuple[Reading, ...]
    label: float | None


@dataclass(frozen=True)
class RewardInputs:
    """Everything a rank can read and check alone. language_model: what the model is made of, if it has no head yet."""

    arch: Architecture
    language_model: Architecture | None
    kind: Kind
    training: list[Example]
    heldout: list[Example]
    directory: RunDirectory
    layers: tuple[int, ...]


def read_reward_inputs(recipe: RewardRecipe, world_size: int) -> RewardInputs:
    """Read and check all inputs; every rank does it alone and fails alike. Raises GrpoMegaError."""
    check_reward(recipe, world_size)
    arch, language_model = read_trunk(recipe.model.path)
    kind, rows = read_judgements(recipe.data.jsonl, "data.jsonl")
    training, heldout = hold_out(rows, recipe.data.heldout, shuffled(len(rows), "heldout", recipe.run.seed))
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.tokenizer)
    check_vocabulary(tokenizer, recipe.model.tokenizer or recipe.model.path, arch.vocab_size)
    limit = min(arch.context_length, recipe.data.max_tokens or arch.context_length)
    reader = Reader(tokenizer, limit, arch.raw.get("pad_token_id"))
    directory = RunDirectory(recipe)
    directory.check()
    return RewardInputs(
        arch=arch,
        language_model=language_model,
        kind=kind,
        training=[_example(row, reader) for row in training],
        heldout=[_example(row, reader) for row in heldout],
        directory=directory,
        layers=layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout),
    )


def _example(row: Judgement, reader: Reader) -> Example:
    try:
        return Example(tuple(reader.whole(row.messages, answer) for answer in row.answers), row.label)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}; remove the row, or raise data.max_tokens") from None


def build_trainer(recipe: RewardRecipe, inputs: RewardInputs, grid: mesh.Mesh, progress: Progress) -> RewardTrainer:
    """The model on the mesh, with its optimizer; every rank must call."""
    arch, dtype = inputs.arch, DTYPES[recipe.precision.dtype]
    weights = weights_for(arch, inputs.language_model)
    model = build_model(
        arch, grid, recipe.parallel, dtype=dtype, recompute=recipe.model.recompute, tick=progress.tick, weights=weights
    )
    head = ScoreHead(model, grid)
    policy = Policy(head, recipe.optimizer, recipe.run.num_steps, overlap=recipe.parallel.overlap)
    if dtype == torch.bfloat16:
        fine = bridge.tensors(model, arch, bridge.Place.of(grid, inputs.layers), torch.float32, weights)
        start_main_weights(policy.optimizer, fine)
    return RewardTrainer(policy, arch, recipe.batch.tokens_per_microbatch)


def train_reward(recipe: RewardRecipe) -> None:
    """Train as the recipe says. Every rank calls; raises GrpoMegaError for what a user can put right."""
    inputs = read_reward_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(**recipe.parallel.sizes)
    progress = progress_on(speaks=grid.is_writer)
    progress.watch()
    with closing(progress), closing(inputs.directory):
        progress.say(
            f"grpo_mega: a reward model from {recipe.model.path} on {grid.world.size} ranks, by {inputs.kind} loss on "
            f"{len(inputs.training)} rows, {len(inputs.heldout)} held out"
        )
        with progress.task("loading weights"):
            trainer = build_trainer(recipe, inputs, grid, progress)
        _steps(recipe, inputs, trainer, progress)
    mesh.shutdown()


def _steps(recipe: RewardRecipe, inputs: RewardInputs, trainer: RewardTrainer, progress: Progress) -> None:
    rule, directory, grid = recipe.run, inputs.directory, trainer.policy.mesh
    start = _resume(recipe, inputs, trainer, progress)
    if start < rule.num_steps:
        write_together(grid, lambda: directory.open(start + 1))
        evaluate(inputs, trainer, start, progress)
    for step in range(start, rule.num_steps):
        with progress.task(f"step {step + 1}/{rule.num_steps}") as task:
            started, size = time.monotonic(), recipe.batch.examples_per_step
            examples = [inputs.training[i] for i in rows_of_step(len(inputs.training), step, size, rule.seed)]
            readings, loss = joined(examples, inputs.kind)
            trainer.policy.begin_step()
            metrics = trainer.update(readings, loss, progress.tick)
            values = {"lr": trainer.policy.learning_rate} | {name: mean.value() for name, mean in metrics.items()}
            seconds, tokens = time.monotonic() - started, sum(len(reading.token_ids) for _, reading in readings)
            timings = {"step_s": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1),
                       "peak_memory_bytes": peak_memory_bytes(grid.device)}  # fmt: skip
            write_together(grid, partial(directory.write_step, step + 1, values, timings))
            task.result = ", ".join(f"{name} {values[name]:.4g}" for name in ("loss", "accuracy", "grad_norm"))
        done = step + 1
        if done == rule.num_steps or (rule.save_every and done % rule.save_every == 0):
            with progress.task("checkpoint"):
                state = {"step": done, "rows": len(inputs.training)}
                checkpoint.save(directory.checkpoints, done, trainer.policy, state, grid, inputs.arch)
        if done == rule.num_steps or (rule.evaluate_every and done % rule.evaluate_every == 0):
            evaluate(inputs, trainer, done, progress)
    _export(recipe, inputs, trainer, progress)
    progress.say(f"reward model (a Hugging Face folder): {directory.hf}")


def rows_of_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of `count` rows a step trains on: the next `size` of an endless run through epochs, each in an order of its
    own. It depends on nothing that happened before: a resumed run needs no state."""
    places = (divmod(position, count) for position in range(step * size, (step + 1) * size))
    return [_order(count, seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return shuffled(count, "judgements", seed, epoch)


def joined(examples: Sequence[Example], kind: Kind) -> tuple[list[tuple[int, Reading]], Loss]:
    """The readings of some rows, answers to one prompt as a group, and the loss of their scores."""
    readings = [(n, reading) for n, example in enumerate(examples) for reading in example.readings]
    if kind == "preference":
        return readings, preference_loss
    return readings, partial(label_loss, labels=torch.tensor([e.label for e in examples], dtype=torch.float64))


def evaluate(inputs: RewardInputs, trainer: RewardTrainer, steps_done: int, progress: Progress) -> dict[str, float]:
    """Loss, accuracy and margin on the held-out rows, recorded; {} without any. Every rank must call."""
    if not inputs.heldout:
        return {}
    with progress.task("held-out", f" after {steps_done} steps") as task:
        readings, loss = joined(inputs.heldout, inputs.kind)
        value, metrics = loss(trainer.scores(readings, progress.tick))
        values = {"loss": float(value)} | {name: mean.value() for name, mean in metrics.items()}
        task.result = f"loss {values['loss']:.4g}, accuracy {values['accuracy']:.3f} ({len(inputs.heldout)} rows)"
    write_together(trainer.policy.mesh, lambda: inputs.directory.write_evaluation(steps_done, values))
    return values


def _resume(recipe: RewardRecipe, inputs: RewardInputs, trainer: RewardTrainer, progress: Progress) -> int:
    found = checkpoint.latest_together(inputs.directory.checkpoints, trainer.policy.mesh)
    if found is None:
        return 0
    state = checkpoint.load(found, trainer.policy)
    if state["rows"] != len(inputs.training):
        raise CheckpointError(
            f"{found} was trained on {state['rows']} rows and {recipe.data.jsonl} leaves {len(inputs.training)} to "
            "train on, so rows would repeat or go missing; go on with the file it began with"
        )
    progress.say(f"resuming from {found}: {state['step']} of {recipe.run.num_steps} steps are done")
    return state["step"]


def _export(recipe: RewardRecipe, inputs: RewardInputs, trainer: RewardTrainer, progress: Progress) -> None:
    policy, hf, failure = trainer.policy, inputs.directory.hf, None
    with progress.task(f"writing {hf}"):
        try:
            bridge.export(policy.settled(), inputs.arch, policy.mesh, inputs.layers, hf, progress.tick)
            if policy.mesh.is_writer:
                with writing(hf):
                    export_tokenizer(hf, recipe.model.tokenizer, None)
        except RunDirectoryError as error:
            failure = error
        raise_together(policy.mesh, failure)
