"""Which pipeline stage holds which layers, and which layouts there are beside one that does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

from grpo_mega.config import ParallelConfig
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


def nearest_layouts(
    asked: ParallelConfig, world_size: int, check: Callable[[ParallelConfig], None], count: int = 3
) -> list[str]:
    """The `count` layouts of that many ranks that are nearest to `asked`, in words; check: raises for one that is none.

    Nearest: the fewest doublings and halvings of an axis, and of a rank's part of the work; of equally near ones the
    one with less tensor parallelism.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = []
    for tensor, pipeline, context in product(divisors, repeat=3):
        if world_size % (tensor * pipeline * context):
            continue
        for virtual in {1, asked.virtual_pipeline if pipeline > 1 else 1}:
            sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "virtual_pipeline": virtual}
            other = asked.model_copy(
                update={**sizes, "sequence": asked.sequence and tensor > 1, "pipeline_layout": None}
            )
            try:
                check(other)
            except ConfigError:
                continue
            changes = [math.log2(sizes[axis] / getattr(asked, axis)) for axis in sizes]
            distance = sum(map(abs, changes)) + abs(sum(changes))
            words = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
            found.append((round(distance, 3), tensor, pipeline, context, words or "no cut at all"))
    return [words for *_, words in sorted(found)[:count]]
