"""A policy under any layout with the samples of `sharded`, its updates, and its checkpoints: what ranks run in tests of
mixtures and of families."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from sharded import TEMPERATURE, objective, samples

from grpo_mega.config import OptimizerConfig, ParallelConfig
from grpo_mega.data.packing import pack
from grpo_mega.model.families import read_architecture
from grpo_mega.parallel.mesh import initialize

ROWS = 32  # of a microbatch; two of them
SETTINGS = {"lr": 1e-2, "eps": 1e-2, "clip_grad": 0.5}  # eps: a step that follows the gradient, not only its sign


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    recompute: str = "none"
    distributed: bool = False
    sequence: bool | None = None  # None: with tensor ranks, as a mixture must

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=self.tensor, pipeline=self.pipeline, context=self.context,
            sequence=self.tensor > 1 if self.sequence is None else self.sequence,
            expert=self.expert, expert_tensor=self.expert_tensor,
        )  # fmt: skip


@dataclass
class Built:
    mesh: object
    arch: object
    policy: object
    place: object
    layers: tuple[int, ...]
    batches: list


def built(folder, layout, dtype, *, moe=None, replays=False, shared=False):
    """A policy, and this rank's microbatches of two samples each: every one a segment of its own, or, with `shared`,
    the first two with the rows of their prompt in common."""
    from megatron.core import parallel_state

    from grpo_mega.model.bridge import Place
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Policy

    parallel_state.destroy_model_parallel()  # of the layout before
    mesh = initialize(**layout.parallel.sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, layout.parallel, dtype=dtype, recompute=layout.recompute, moe=moe)
    settings = OptimizerConfig(**SETTINGS, distributed=layout.distributed)
    policy = Policy(TokenHead(model, arch.vocab_size, mesh, TEMPERATURE), settings, num_steps=4, replays=replays)
    layers = layers_per_stage(arch, layout.pipeline)
    s = samples()
    bundles = ([s[:2]] if shared else [s[:1], s[1:2]], [s[2:3], s[3:]])
    batches = [pack(several, ROWS, scale=2 * ROWS, dtype=dtype, device=mesh.device) for several in bundles]
    mine = batches[mesh.data.rank % 2 :: min(mesh.data.size, 2)]  # of four data ranks two see what others see
    return Built(mesh, arch, policy, Place.of(mesh, layers), layers, mine)


def saved(folder, layout, directory):
    from grpo_mega.trainer import checkpoint

    run = built(folder, layout, torch.float32)
    run.policy.begin_step()
    run.policy.update(run.batches, objective)
    checkpoint.save(directory, 1, run.policy, {"step": 1}, run.mesh, run.arch)


def resumed(folder, layout, directory, destination):
    """The weights after the checkpoint's update and another one."""
    from grpo_mega.model import bridge
    from grpo_mega.trainer import checkpoint

    run = built(folder, layout, torch.float32)
    if directory is None:  # without an interruption
        run.policy.begin_step()
        run.policy.update(run.batches, objective)
    else:
        checkpoint.load(checkpoint.latest(directory), run.policy)
    run.policy.begin_step()
    run.policy.update(run.batches, objective)
    bridge.export(run.policy.settled(), run.arch, run.mesh, run.layers, destination)


def same(folder, wanted, what, tolerance=2e-6):
    found, wanted = (load_file(f / "model.safetensors") for f in (folder, wanted))
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=f"{what}: {name}")
