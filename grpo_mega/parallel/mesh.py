"""The mesh: this rank's coordinates and process groups. Everything else asks it instead of comparing ranks.

Megatron-core keeps its groups in a global (`parallel_state`); this module is the only one that touches it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

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
    """tensor x pipeline x data, megatron's order (tensor fastest).

    `replica` spans the tensor and pipeline ranks that hold one copy of the model; `tokens` spans the same ranks as
    `pipeline` through a communicator of its own, for the sampler's tokens that travel against the hidden states.
    """

    device: torch.device
    rank: int
    world: Axis
    tensor: Axis
    pipeline: Axis
    data: Axis
    replica: Axis
    tokens: Axis

    @property
    def is_writer(self) -> bool:
        """The one rank that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def leads_replica(self) -> bool:
        """The one rank of each model replica that scores and reports its completions."""
        return self.replica.first


def world_size_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def check_world(world_size: int, tensor: int, pipeline: int) -> None:
    """Raise ConfigError unless the ranks divide into whole model replicas."""
    replica = tensor * pipeline
    if world_size % replica:
        raise ConfigError(
            f"{world_size} ranks do not divide into replicas of parallel.tensor={tensor} x parallel.pipeline="
            f"{pipeline} = {replica} ranks; start {replica} ranks or a multiple, or change the layout"
        )


def initialize(tensor: int = 1, pipeline: int = 1, *, timeout_s: float = 1800.0) -> Mesh:
    """Join the process group that the environment describes (torchrun's variables; none: a world of one) and cut it.

    Every rank of the world must call this. Raises ConfigError, before any collective, if the world does not fit.
    """
    world_size = world_size_from_environment()
    check_world(world_size, tensor, pipeline)
    device = devices.prepare()
    from megatron.core import parallel_state as mpu

    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(devices.backend(device), timeout=limit)
        else:
            store = dist.HashStore()
            dist.init_process_group(devices.backend(device), store=store, rank=0, world_size=1, timeout=limit)
    mpu.initialize_model_parallel(tensor, pipeline)
    _seed_megatron()
    data, replica = mpu.get_data_parallel_group(), mpu.get_model_parallel_group()
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world=_axis(dist.group.WORLD),
        tensor=_axis(mpu.get_tensor_model_parallel_group()),
        pipeline=_axis(mpu.get_pipeline_model_parallel_group()),
        data=_axis(data),
        replica=_axis(replica),
        tokens=_axis(_twin_of_pipeline(tensor, pipeline)),
    )


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


def _twin_of_pipeline(tensor: int, pipeline: int) -> ProcessGroup:
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
