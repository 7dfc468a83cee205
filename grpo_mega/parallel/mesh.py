"""The mesh: this rank's coordinates and process groups. Everything else asks it instead of comparing ranks.

Megatron-core keeps its groups in a global (`parallel_state`); this module is the only one that touches it.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from grpo_mega.errors import ConfigError
from grpo_mega.parallel import device as devices


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: its group (None for a single process), this rank's place on it, and its length."""

    group: ProcessGroup | None
    rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """tensor x context x data x pipeline, megatron's order (tensor fastest).

    `replica` spans the tensor and pipeline ranks that hold one copy of the model; context ranks hold copies that share
    the rows of the same microbatches; data ranks have microbatches of their own. `expert` ranks hold different experts
    of a mixture, `expert_tensor` ranks different slices of the same ones: megatron's second grid over the ranks of a
    pipeline stage (expert_tensor fastest, then expert), whatever those are in the first one. `experts` spans both: the
    ranks that exchange rows in every mixture layer. `tokens` spans the same ranks as
    `pipeline` through a communicator of its own, for the sampler's tokens that travel against the hidden states.
    Each pipeline rank has `virtual` of the model's stages: see `stages`.
    """

    device: torch.device
    rank: int
    world: Axis
    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    replica: Axis
    tokens: Axis
    expert: Axis
    expert_tensor: Axis
    experts: Axis
    virtual: int
    groups: Any = field(repr=False, compare=False)  # megatron's ProcessGroupCollection of this layout
    _megatron: Mapping[str, Any] = field(repr=False, compare=False)  # parallel_state's globals under this layout

    @property
    def is_writer(self) -> bool:
        """The one rank that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def leads_replica(self) -> bool:
        """The one rank of each data-parallel rank's replicas that scores and reports its completions."""
        return self.replica.first and self.context.first

    @property
    def stages(self) -> range:
        """Which of the model's stages this rank holds, in model order: rank, rank + pipeline, ..."""
        return range(self.pipeline.rank, self.pipeline.size * self.virtual, self.pipeline.size)

    @property
    def holders(self) -> Axis:
        """Ranks that hold the whole model between them: a replica, or all where experts lie on other replicas."""
        return self.replica if self.tensor.size % self.experts.size == 0 else self.world

    @property
    def in_step(self) -> Axis:
        """Ranks that must run equally many forwards together because experts of each serve the others.

        Those of a tensor group always do; `experts` joins several of them where it is as long as a few of them are.
        """
        if self.tensor.size % self.experts.size == 0:
            return Axis(None, 0, 1)
        return self.experts if self.experts.size % self.tensor.size == 0 else self.world

    def share(self, count: int) -> list[int]:
        """Which of a step's `count` prompts, by place, belong to this data-parallel rank: every size-th, so that each
        minibatch, a run of places, spreads over all ranks."""
        return list(range(self.data.rank, count, self.data.size))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let megatron's modules see this layout in parallel_state, where the ranks are cut in more than one way.

        Of a dense model they read there, whatever groups they were given (0.16.1 and 0.19.2 but where it says so):
        - in the build, the pipeline rank and whether there are virtual stages: transformer/
          pipeline_parallel_layer_layout.py, get_layer_offset, by which layers are numbered. 0.19.2 asks again in every
          forward (transformer_block.py) and would refuse a model without virtual stages beside one that has them;
        - in the build, weight-gathering groups: tensor_parallel/layers.py (0.19.2; unused here, of one rank each);
        - in the forward, the tensor group and rank: transformer/attention.py, get_query_key_value_tensors, where more
          tensor ranks than key-value heads share their projections (0.16.1);
        - in the forward, the tensor group: tensor_parallel/layers.py, linear_with_frozen_weight under a row-parallel
          layer, which uses it in no forward.
        Schedule, hand-overs, embedding, linears and mappings do with the groups that they are given.
        """
        before = _globals()
        _set_globals(self._megatron)
        try:
            yield
        finally:
            _set_globals(before)


def world_size_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", 0))


def check_world(
    world_size: int,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    section: str = "parallel",
) -> None:
    """Raise ConfigError unless the ranks divide into whole model replicas of the recipe section's layout."""
    replica = tensor * pipeline * context
    if world_size % replica:
        cut = f" x {section}.context={context}" if context > 1 else ""
        raise ConfigError(
            f"{world_size} ranks do not divide into replicas of {section}.tensor={tensor} x {section}.pipeline="
            f"{pipeline}{cut} = {replica} ranks; start {replica} ranks or a multiple, or change the layout"
        )
    slices = tensor if expert_tensor is None else expert_tensor
    stage = world_size // pipeline
    if stage % (slices * expert):
        fits = [e for e in range(1, stage + 1) if stage % (slices * e) == 0]
        either = math.lcm(replica, slices * expert * pipeline)
        use = f"use {section}.expert in {fits}" if fits else f"{section}.expert_tensor must divide {stage}"
        raise ConfigError(
            f"the {stage} ranks of a pipeline stage do not divide into {section}.expert={expert} x "
            f"{section}.expert_tensor={slices} = {slices * expert} ranks; {use}, or start {either} ranks or a multiple"
        )


def initialize(tensor: int = 1, pipeline: int = 1, *, timeout_s: float = 1800.0, **more: Any) -> Mesh:
    """Join the process group that the environment describes (torchrun's variables; none: a world of one) and cut it.

    tensor, pipeline, more: `ParallelConfig.sizes`; an axis that is left out has length 1. Every rank of the world must
    call this. Raises ConfigError, before any collective, if the world does not fit.
    """
    world_size = world_size_from_environment()
    check_world(world_size, tensor, pipeline, **more)
    device = devices.prepare()
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(devices.backend(device), timeout=limit)
        else:
            store = dist.HashStore()
            dist.init_process_group(devices.backend(device), store=store, rank=0, world_size=1, timeout=limit)
    mesh = _cut(device, tensor, pipeline, **more)
    _seed_megatron()
    return mesh


def another_layout(mesh: Mesh, **sizes: Any) -> Mesh:
    """The same ranks cut in another way, beside `mesh`, which stays the one that megatron sees (see `Mesh.active`).

    sizes: as of `initialize`. Every rank must call. Raises ConfigError, before any collective, if the world does not
    divide.
    """
    check_world(mesh.world.size, **sizes)
    before = _globals()
    _set_globals({name: {} if isinstance(value, dict) else None for name, value in before.items()})
    try:
        return _cut(mesh.device, **sizes)
    finally:
        _set_globals(before)


@contextmanager
def temporary_groups() -> Iterator[None]:
    """Give back every group that is made in here, the world's excepted: each keeps threads, on gloo some sixty a
    layout.

    For those who try layouts one after the other; every rank must. What uses the groups must not outlive it.
    """
    from megatron.core import parallel_state as mpu

    live = dist.distributed_c10d._world.pg_map
    before = set(live)
    try:
        yield
    finally:
        made = mpu._global_process_group_list or []  # which would keep them alive
        for group in set(live) - before - {dist.group.WORLD}:
            dist.destroy_process_group(group)
            if group in made:
                made.remove(group)
        gc.collect()  # gradient buffers and their hooks hold each other, and groups


def _cut(
    device: torch.device,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
) -> Mesh:
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection

    mpu.initialize_model_parallel(
        tensor,
        pipeline,
        virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world=_axis(dist.group.WORLD),
        tensor=_axis(mpu.get_tensor_model_parallel_group()),
        pipeline=_axis(mpu.get_pipeline_model_parallel_group()),
        context=_axis(mpu.get_context_parallel_group()),
        data=_axis(mpu.get_data_parallel_group()),
        replica=_axis(mpu.get_model_parallel_group()),
        tokens=_axis(_twin_of_pipeline()),
        expert=_axis(mpu.get_expert_model_parallel_group()),
        expert_tensor=_axis(mpu.get_expert_tensor_parallel_group()),
        experts=_axis(mpu.get_expert_tensor_and_model_parallel_group()),
        virtual=virtual_pipeline,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        _megatron=_globals(),
    )


def _globals() -> dict[str, Any]:
    """parallel_state's groups and sizes: its private names in capitals, all of them None before it is initialised."""
    from megatron.core import parallel_state as mpu

    return {name: value for name, value in vars(mpu).items() if name.startswith("_") and name.isupper()}


def _set_globals(values: Mapping[str, Any]) -> None:
    from megatron.core import parallel_state as mpu

    vars(mpu).update(values)


def shutdown() -> None:
    """Wait for every rank, leave the process group and forget megatron's global groups."""
    from megatron.core import parallel_state as mpu

    if dist.is_initialized():
        dist.barrier()
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _axis(group: ProcessGroup | None) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))


def _twin_of_pipeline() -> ProcessGroup:
    """A second communicator over each pipeline. Every rank creates every group, in the same order."""
    from megatron.core import parallel_state as mpu

    mine = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        group = dist.new_group(list(ranks))
        if tuple(mine) == ranks:
            result = group
    return result


def _seed_megatron() -> None:
    """GRPO trains without dropout, so megatron's forked random states must only exist (FACTS: attention forks them)."""
    from megatron.core.tensor_parallel import random

    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    random.model_parallel_cuda_manual_seed(1234, inference_rng_tracker=True, force_reset_rng=True)
