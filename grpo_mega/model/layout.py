"""Which pipeline stage holds which layers."""

from __future__ import annotations

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture


def layers_per_stage(arch: Architecture, stages: int, given: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Layers of each stage: `given` after a check, or the split whose most expensive stage is cheapest.

    Costs are in decoder layers: the last stage also runs the output head (H V weights against a layer's), the first
    the embedding, a copy of rows that costs a twentieth of the head. Any layer count can be split. Raises ConfigError.
    """
    if given is not None:
        if sum(given) != arch.num_layers:
            raise ConfigError(
                f"parallel.pipeline_layout={list(given)} holds {sum(given)} layers but the model has "
                f"{arch.num_layers}; make them add up, or leave it out for {list(layers_per_stage(arch, stages))}"
            )
        if min(given) < 1:
            raise ConfigError(f"parallel.pipeline_layout={list(given)} has an empty stage; give each at least 1 layer")
        return given
    head = arch.head_parameters / arch.layer_parameters
    costs = [0.0] * stages
    costs[0] += head / 20
    costs[-1] += head
    counts = [1] * stages
    for _ in range(arch.num_layers - stages):
        cheapest = min(range(stages), key=lambda stage: costs[stage] + counts[stage])
        counts[cheapest] += 1
    return tuple(counts)


def first_layer(layers: tuple[int, ...], stage: int) -> int:
    """The model's number (from 0) of a stage's first layer."""
    return sum(layers[:stage])
