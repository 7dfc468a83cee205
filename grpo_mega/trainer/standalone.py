"""`grpo-mega eval`: a model on a recipe's held-out problems, without anything that training needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo_mega.config import Recipe, to_yaml
from grpo_mega.data.corpus import load_heldout
from grpo_mega.data.prompts import DataCounts, heldout_prompts
from grpo_mega.data.tokenizer import ChatTokenizer, check_vocabulary, load_tokenizer
from grpo_mega.errors import CheckpointError, RunDirectoryError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.build import DTYPES, build_model
from grpo_mega.model.decode import Decoder
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.parallel import mesh
from grpo_mega.parallel.truncation import Truncation
from grpo_mega.rewards.resolve import Part, check_row, resolve_reward
from grpo_mega.trainer.check import RESULT, check_evaluation, check_output, sampling_layout
from grpo_mega.trainer.evaluation import Evaluation, Examination, examine
from grpo_mega.trainer.main import describe
from grpo_mega.trainer.progress import Progress, progress_on
from grpo_mega.trainer.records import check_writable, replace_file, write_together
from grpo_mega.trainer.reward_model import Judge, build_reward_models, check_conversations, read_judges
from grpo_mega.trainer.scoring import Scoring
from grpo_mega.trainer.setup import heldout_renderer, sampler_on
from grpo_mega.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """What a rank reads and checks alone. step: the training steps that made the model, which key its noise."""

    arch: Architecture
    tokenizer: ChatTokenizer
    prompts: list[Prompt]
    data: DataCounts
    reward: tuple[Part, ...]
    judges: Mapping[str, Judge]
    step: int


def evaluate_model(recipe: Recipe, output: str | None = None) -> None:
    """Evaluate `model.path` on the recipe's held-out problems, under the layout that training would sample under.

    Every rank calls; the writing rank prints a table and leaves evaluation.json, completions.parquet and recipe.yaml.
    No gradient, optimizer or reference is made. Raises GrpoMegaError for what a user can put right.
    """
    path = check_output(recipe, output)
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    check_writable(path, "run.directory" if output is None else "--output")
    grid = mesh.initialize(**sampling_layout(recipe).sizes)
    progress = progress_on(speaks=grid.is_writer)
    progress.watch()
    with closing(progress):
        for line in inputs.data.lines():
            progress.say(line)
        exam = build_examination(recipe, inputs, grid, progress)
        with progress.task(f"evaluating {recipe.model.path}"):
            evaluation = examine(exam, inputs.step)
        write_together(grid, lambda: write(path, recipe, evaluation))
        for line in table(evaluation):
            progress.say(line)
        progress.say(f"records: {path}/")
    mesh.shutdown()


def read_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Every rank does it alone and fails alike; training data are not read where there is a held-out source."""
    arch = check_evaluation(recipe, world_size)
    reward = resolve_reward(recipe.reward, recipe.sampling.max_completion_tokens)
    rows, name = load_heldout(recipe.data, recipe.run.seed, demonstrated=recipe.sampling.source == "data")
    for row in rows:
        check_row(recipe.reward, row["origin"], row["answer"], row["fields"])
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.tokenizer, recipe.data.chat_template)
    check_vocabulary(tokenizer, recipe.model.tokenizer or recipe.model.path, arch.vocab_size)
    render = heldout_renderer(recipe, tokenizer, arch)
    prompts, counts = heldout_prompts(rows, render, name)
    judges = read_judges(recipe)
    check_conversations(judges, prompts)
    counted = DataCounts(render.overlong, (), counts)
    return Inputs(arch, tokenizer, prompts, counted, reward, judges, steps_of(arch))


def steps_of(arch: Architecture) -> int:
    """The training steps behind a checkpoint of ours, 0 for any other model.

    They key the noise: a checkpoint of a run draws here what the run drew when it evaluated after that step.
    """
    state = find_checkpoint(arch.folder).folder / "trainer.json"
    if not state.is_file():
        return 0
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{state} is damaged ({type(error).__name__}: {error}); take another checkpoint"
        ) from None


def build_examination(recipe: Recipe, inputs: Inputs, grid: mesh.Mesh, progress: Progress) -> Examination:
    """Load the model for sampling alone. Every rank must call."""
    layout, arch, rule = sampling_layout(recipe), inputs.arch, recipe.evaluation_sampling
    dtype = recipe.precision.sampling or recipe.precision.dtype
    layers = layers_per_stage(arch, layout.stages, layout.pipeline_layout)
    progress.say(describe(recipe.model.path, grid, layers, dtype))
    with progress.task("loading weights"):
        model = build_model(arch, grid, layout, dtype=DTYPES[dtype], trainable=False, tick=progress.tick).eval()
    truncation = Truncation.of(rule.top_k, rule.top_p)
    decoder = partial(Decoder, model, arch.vocab_size, grid, rule.temperature, progress.tick, truncation)
    sampler = sampler_on(decoder, grid, inputs.tokenizer, rule, recipe.run.seed)
    models = build_reward_models(recipe, inputs.judges, grid, layout)
    scoring = Scoring(recipe.reward, inputs.reward, models, inputs.tokenizer.decode, grid, progress.tick)
    return Examination(recipe, inputs.prompts, scoring, sampler, grid)


def result_of(recipe: Recipe, evaluation: Evaluation) -> dict[str, Any]:
    """evaluation.json: what was asked and what came out; the same numbers under every layout."""
    rule = recipe.evaluation_sampling
    return {
        "model": recipe.model.path,
        "step": evaluation.step,
        "seed": recipe.run.seed,
        "correct": recipe.evaluation.correct_part(recipe.reward),
        "temperature": recipe.evaluation.temperature if recipe.evaluation.temperature == 0 else rule.temperature,
        "max_completion_tokens": rule.max_completion_tokens,
        **evaluation.counts,
        "metrics": {
            name: {
                key: None if value != value else value for key, value in zip(("mean", "low", "high"), of, strict=True)
            }
            for name, of in ((name, (of.mean, of.low, of.high)) for name, of in evaluation.estimates.items())
        },
    }


def write(path: Path, recipe: Recipe, evaluation: Evaluation) -> None:
    """The three files, evaluation.json last: where it is, the others are whole."""
    from grpo_mega.trainer.rollout_file import evaluation_bytes

    rows = evaluation_bytes(evaluation.step, evaluation.groups, evaluation.verdicts)
    try:
        replace_file(path / "completions.parquet", rows)
        replace_file(path / "recipe.yaml", to_yaml(recipe).encode())
        replace_file(path / RESULT, (json.dumps(result_of(recipe, evaluation), indent=2) + "\n").encode())
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise RunDirectoryError(
            f"{path} can be written no more ({reason}); free space or name another --output, and evaluate again"
        ) from error


def table(evaluation: Evaluation) -> list[str]:
    """A line a metric: name, mean, 95 % interval."""
    counts = evaluation.counts
    lines = [
        f"{counts['problems']} problems x {counts['completions']} completions",
        f"{'':<18}{'mean':>9}   95 % interval",
    ]
    for name, of in evaluation.estimates.items():
        interval = f"{of.low:.3f} to {of.high:.3f}" if of.low == of.low else "none of one problem"
        lines.append(f"{name:<18}{of.mean:>9.3f}   {interval}")
    if counts["reward_errors"]:
        lines.append(f"completions whose reward failed: {counts['reward_errors']} (`error` in completions.parquet)")
    return lines
