"""What can be refused within a second, without megatron, by any one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_mega.config import ParallelConfig, Recipe
from grpo_mega.config.data import PLACES
from grpo_mega.config.reward_model import RewardModelConfig
from grpo_mega.config.reward_training import RewardRecipe
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture, check_experts, check_layout
from grpo_mega.model.families import read_architecture, read_scored, read_trunk
from grpo_mega.model.layout import layers_per_stage, nearest_layouts
from grpo_mega.model.names import shapes
from grpo_mega.parallel.mesh import check_world

RESULT = "evaluation.json"


def check_cheaply(recipe: Recipe, world_size: int) -> Architecture:
    """What can be refused within a second: the model folder, the layout, the world. Raises ConfigError."""
    if not recipe.data.trains:
        raise ConfigError(
            "data.heldout_source alone is for grpo-mega eval, and leaves nothing to train on; give exactly one of "
            f"{', '.join(f'data.{key}' for key in PLACES)}, or a list data.sources"
        )
    arch = read_architecture(recipe.model.path)
    check_parallel(arch, recipe.parallel, world_size)
    _check_mixture(arch, recipe)
    layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout)
    check_parallel(arch, sampling_layout(recipe), world_size, "sampling")
    _check_judges(recipe, recipe.parallel, world_size)
    if recipe.grpo.kl_coef > 0:
        other = read_architecture(recipe.reference_path)
        own = recipe.reference.layout
        layout, section = (recipe.parallel, "parallel") if own is None else (own, "reference")
        check_parallel(other, layout, world_size, section)
        if other.vocab_size != arch.vocab_size:
            raise ConfigError(
                f"reference.path={recipe.reference.path} has a vocabulary of {other.vocab_size}, the policy "
                f"{arch.vocab_size}; a reference must share the policy's tokenizer"
            )
        if recipe.reference.refresh_every and shapes(other) != shapes(arch):
            raise ConfigError(
                f"reference.refresh_every={recipe.reference.refresh_every} makes the policy the reference, and "
                f"reference.path={recipe.reference_path} is a model of another shape; leave one of them out"
            )
    return arch


def check_evaluation(recipe: Recipe, world_size: int) -> Architecture:
    """The same for a run that only samples: under the layout that training would sample under."""
    if not recipe.data.heldout:
        raise ConfigError("data.heldout=0 leaves no problem to evaluate on; set data.heldout")
    arch, layout = read_architecture(recipe.model.path), sampling_layout(recipe)
    check_parallel(arch, layout, world_size, "sampling" if layout.sizes != _without_context(recipe) else "parallel")
    _check_mixture(arch, recipe)
    layers_per_stage(arch, layout.stages, layout.pipeline_layout)
    _check_judges(recipe, layout, world_size)
    return arch


def _check_judges(recipe: Recipe, beside: ParallelConfig, world_size: int) -> None:
    for name, config in recipe.reward_models.items():
        model = read_scored(config.path)
        section = "parallel" if config.layout is None else f"reward_models.{name}"
        check_parallel(model, judging_layout(config, beside, model), world_size, section)


def check_output(recipe: Recipe, output: str | None) -> Path:
    """Where an evaluation's files go: `output`, or run.directory/evaluations/NAME, NAME being the model folder's.

    Raises ConfigError where an evaluation is already.
    """
    path = Path(recipe.run.directory) / "evaluations" / Path(recipe.model.path).resolve().name
    path = path if output is None else Path(output)
    if (path / RESULT).exists():
        raise ConfigError(f"{path} holds an evaluation already; name another folder with --output, or delete it")
    return path


def _without_context(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.parallel.sizes, "context": 1}


def check_parallel(arch: Architecture, parallel: ParallelConfig, world_size: int, section: str = "parallel") -> None:
    """Raise ConfigError, with the nearest layouts that do fit, unless the model and the ranks can be cut that way."""
    try:
        _check_cut(arch, parallel, world_size, section)
    except ConfigError as error:
        near = nearest_layouts(parallel, world_size, lambda other: _check_cut(arch, other, world_size, section))
        if not near:
            raise
        raise ConfigError(f"{error}; nearest on {world_size} ranks: {', '.join(near)}") from None


def _check_cut(arch: Architecture, parallel: ParallelConfig, world_size: int, section: str) -> None:
    check_layout(arch, parallel.tensor, parallel.pipeline, section, virtual=parallel.virtual_pipeline)
    check_experts(arch, parallel.tensor, parallel.expert, parallel.expert_tensor, section=section)
    check_world(world_size, **parallel.sizes, section=section)


def _check_mixture(arch: Architecture, recipe: Recipe) -> None:
    """Raise ConfigError unless the recipe's words about experts are about this model's."""
    parallel = recipe.parallel
    if not arch.num_experts:
        for key, value in recipe.moe.model_dump(exclude_defaults=True).items():
            raise ConfigError(
                f"moe.{key}={value} is about a mixture of experts, and {arch.folder} is a "
                f"{arch.raw['architectures'][0]}, which has none; leave it out"
            )
    else:
        check_mixture_rows(arch, parallel)


def check_mixture_rows(arch: Architecture, parallel: ParallelConfig) -> None:
    """Raise ConfigError where megatron would refuse to train the mixture."""
    if arch.num_experts and parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} without parallel.sequence sends every row of a mixture of experts once "
            "for each tensor rank, which megatron refuses in training; set parallel.sequence=true"
        )


def sampling_layout(recipe: Recipe) -> ParallelConfig:
    """The layout that completions are sampled under: training's, but for what `sampling` says of its own."""
    training, own = recipe.parallel, recipe.sampling
    own_sizes = {
        key: getattr(own, key) or getattr(training, key) for key in ("tensor", "pipeline", "expert", "expert_tensor")
    }
    if own_sizes == {key: getattr(training, key) for key in own_sizes}:
        return training.model_copy(
            update={"context": 1}
        )  # its ranks hold whole models: they sample prompts of their own
    return ParallelConfig(**own_sizes)


def check_reward(recipe: RewardRecipe, world_size: int) -> Architecture:
    """What can be refused within a second: the model folder, the layout, the world. Raises ConfigError."""
    arch, _ = read_trunk(recipe.model.path)
    check_parallel(arch, recipe.parallel, world_size)
    check_mixture_rows(arch, recipe.parallel)
    layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout)
    return arch


def judging_layout(config: RewardModelConfig, training: ParallelConfig, arch: Architecture) -> ParallelConfig:
    """A reward model's layout: its own, or training's, with stages balanced for this model and no ranks for experts
    that it does not have."""
    inherited: dict[str, object] = {"pipeline_layout": None}
    if not arch.num_experts:
        inherited |= {"expert": 1, "expert_tensor": None}
    return config.layout or training.model_copy(update=inherited)
