"""What can be refused within a second, without megatron, by any one process."""

from __future__ import annotations

from grpo_mega.config import ParallelConfig, Recipe
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture, check_experts, check_layout, read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.parallel.mesh import check_world


def check_cheaply(recipe: Recipe, world_size: int) -> Architecture:
    """What can be refused within a second: the model folder, the layout, the world. Raises ConfigError."""
    arch = read_architecture(recipe.model.path)
    check_layout(arch, recipe.parallel.tensor, recipe.parallel.stages)
    _check_mixture(arch, recipe)
    layers_per_stage(arch, recipe.parallel.stages, recipe.parallel.pipeline_layout)
    check_world(world_size, **recipe.parallel.sizes)
    sampling = sampling_layout(recipe)
    check_layout(arch, sampling.tensor, sampling.stages, section="sampling")
    check_world(world_size, **sampling.sizes, section="sampling")
    if recipe.grpo.kl_coef > 0 and recipe.reference.path is not None:
        other = read_architecture(recipe.reference.path)
        check_layout(other, recipe.parallel.tensor, recipe.parallel.stages)
        check_experts(other, recipe.parallel.tensor, recipe.parallel.expert, recipe.parallel.expert_tensor)
        if other.vocab_size != arch.vocab_size:
            raise ConfigError(
                f"reference.path={recipe.reference.path} has a vocabulary of {other.vocab_size}, the policy "
                f"{arch.vocab_size}; a reference must share the policy's tokenizer"
            )
    return arch


def _check_mixture(arch: Architecture, recipe: Recipe) -> None:
    """Raise ConfigError unless the recipe's words about experts are about this model's."""
    parallel, sampling = recipe.parallel, sampling_layout(recipe)
    check_experts(arch, parallel.tensor, parallel.expert, parallel.expert_tensor)
    check_experts(arch, sampling.tensor, sampling.expert, sampling.expert_tensor, section="sampling")
    if not arch.num_experts:
        for key, value in recipe.moe.model_dump(exclude_defaults=True).items():
            raise ConfigError(
                f"moe.{key}={value} is about a mixture of experts, and {arch.folder} is a "
                f"{arch.raw['architectures'][0]}, which has none; leave it out"
            )
    elif parallel.tensor > 1 and not parallel.sequence:
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
