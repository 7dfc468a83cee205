"""Each family, there and back: the same bits under every cut, and the logits that transformers has."""

from __future__ import annotations

import families
import pytest
import torch
from families import MODELS, TOKENS, logits_of, make_family
from safetensors.torch import load_file

from grpo_mega.config import ParallelConfig
from grpo_mega.model.families import read_architecture
from grpo_mega.parallel.mesh import initialize, temporary_groups

CUTS = {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name) for name in MODELS}


# ---- on the ranks


def there_and_back(folders, cuts, destination):
    """(name, cut) -> logits [T, V] of TOKENS on rank 0; exports beside."""
    answers = {}
    for name, folder in folders.items():
        arch = read_architecture(folder)
        for cut in cuts:
            if "expert" in cut and not arch.num_experts:
                continue
            answers[name, str(cut)] = one(folder, cut, destination / f"{name}-{'-'.join(cut)}")
    return answers


@temporary_groups()
def one(folder, cut, destination):
    from megatron.core import parallel_state

    from grpo_mega.model import bridge
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.model.logits import logits_of as gathered_logits

    parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(**cut)
    mesh = initialize(**parallel.sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, parallel, trainable=False).eval()
    bridge.export(model, arch, mesh, layers_per_stage(arch, parallel.stages), destination)
    found = gathered_logits(model, arch.vocab_size, mesh, [TOKENS])
    return found[0] if found else None


# ---- in the parent


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_bits_and_transformers_logits(ranks, folders, tmp_path, world):
    by_rank = ranks(world, there_and_back, folders, CUTS[world], tmp_path, timeout=200)
    wanted = {name: logits_of(folder) for name, folder in folders.items()}
    for key in by_rank[0]:
        name, _cut = key
        found = [rank[key] for rank in by_rank if rank[key] is not None]
        assert found, key
        for logits in found:
            assert (logits - wanted[name]).abs().max() <= 1e-5, key
            assert wanted[name].abs().max() > 0.5, f"{name}: nothing to compare"
    for folder in tmp_path.iterdir():
        same_bits(folder, folders[folder.name.rpartition("-")[0]])


def same_bits(made, original):
    found, wanted = (load_file(path / "model.safetensors") for path in (made, original))
    assert found.keys() == wanted.keys(), made
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (made, name)


def test_the_models_are_odd_enough():
    sizes = families.COMMON
    assert sizes["vocab_size"] % 2 and sizes["num_attention_heads"] & (sizes["num_attention_heads"] - 1)
    assert sizes["num_key_value_heads"] < sizes["num_attention_heads"]
    assert sizes["head_dim"] * sizes["num_attention_heads"] != sizes["hidden_size"]
