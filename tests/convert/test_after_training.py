"""One step under TP 2 x PP 2, exported: transformers computes the policy's logits, and not the old ones."""

from __future__ import annotations

from functools import partial

import families
import pytest
import torch
from families import make_family
from sharded import TEMPERATURE, objective, samples

from grpo_mega.config import OptimizerConfig, ParallelConfig
from grpo_mega.data.packing import pack
from grpo_mega.parallel.mesh import initialize

ROWS = 32


def train_and_export(folder, destination):
    """The policy's logits after an update, on rank 0."""
    from grpo_mega.model import bridge
    from grpo_mega.model.build import build_model
    from grpo_mega.model.families import read_architecture
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.model.logits import logits_of
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Policy

    parallel = ParallelConfig(tensor=2, pipeline=2, sequence=True)
    mesh = initialize(**parallel.sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, parallel)
    policy = Policy(TokenHead(model, arch.vocab_size, mesh, TEMPERATURE), OptimizerConfig(lr=1e-2), num_steps=1)
    several = samples()
    make = partial(pack, scale=2 * ROWS, dtype=torch.float32, device=mesh.device)
    batches = [make(bundles, ROWS) for bundles in ([several[:2]], [several[2:3]])]
    policy.begin_step()
    policy.update(batches, objective)
    settled = policy.settled()
    bridge.export(settled, arch, mesh, layers_per_stage(arch, parallel.stages), destination)
    return logits_of(settled, arch.vocab_size, mesh, [families.TOKENS])


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_an_export_is_the_policy(ranks, tmp_path, name):
    folder = make_family(tmp_path / "model", name)
    ((found,), *others) = ranks(4, train_and_export, folder, tmp_path / "trained", timeout=120)
    assert others == [[], [], []]
    wanted = families.logits_of(tmp_path / "trained")
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert (found - families.logits_of(folder)).abs().max() > 0.05
    assert torch.isfinite(found).all()
