"""Megatron-LM's checkpoints of old: every rank's pickle, of any layout and naming, gives the same bits."""

from __future__ import annotations

import enum
import os
import random
import re
import shutil
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from families import make_family
from safetensors.torch import load_file
from torch.nn.functional import pad

from grpo_mega.errors import ConfigError
from grpo_mega.model.bridge import Place, entries
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats import config_of, open_weights
from grpo_mega.model.formats.arguments import arguments_of
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.model.formats.legacy import LegacyCheckpoint
from grpo_mega.model.formats.torch_dist_writer import megatron_padding
from grpo_mega.model.names import shapes

NAMES = ("llama3", "qwen2", "mixtral")
LAYERS = {1: (4,), 2: (1, 3), 4: (1, 1, 1, 1)}  # of the stages


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name, num_hidden_layers=4) for name in NAMES}


# ---- what Megatron-LM would have saved


def local(name):
    return name


def fused(name):
    """Names of Transformer Engine's layers."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    name = re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc.\.weight)", r"experts.\2\1", name)
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def old(name):
    """--use-legacy-models."""
    for now, then in (
        ("decoder.final_layernorm", "language_model.encoder.final_norm"),
        ("decoder.", "language_model.encoder."),
        ("embedding.", "language_model.embedding."),
        ("output_layer.", "language_model.output_layer."),
        ("input_layernorm", "input_norm"),
        ("pre_mlp_layernorm", "post_attention_norm"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    ):
        name = name.replace(now, then)
    return name


def nested(state):
    """As models of old keep their parts: {"language_model": {"encoder": {"layers.0...": tensor}, ...}}."""
    made = {}
    for name, value in state.items():
        first, second, rest = name.split(".", 2)
        made.setdefault(first, {}).setdefault(second, {})[rest] = value
    return made


class ModelType(enum.Enum):
    encoder_or_decoder = 1


ModelType.__module__ = "megatron.nowhere.enums"


def megatron_there():
    """While Megatron-LM runs; what reads its checkpoints has not got this module."""
    module = types.ModuleType("megatron.nowhere.enums")
    module.ModelType = ModelType
    return mock.patch.dict(sys.modules, {"megatron.nowhere.enums": module, "megatron.nowhere": module})


def slice_of(arch, weights, whole, parts, place):
    """This place's part of one of megatron's tensors, the vocabulary padded as Megatron-LM does."""
    if whole.padded:
        rows = megatron_padding(arch.vocab_size, place.tensor_size)
        value = weights[whole.pieces[0].name]
        return pad(value, (0, 0, 0, rows - len(value)), value=9.0).chunk(place.tensor_size)[place.tensor].clone()
    stacked = [weights[p.name].narrow(p.dim, p.source, p.length) for p in sorted(parts, key=lambda p: p.start)]
    return torch.cat(stacked, dim=parts[0].dim)


def write(arch, root, *, tensor=1, pipeline=1, virtual=1, expert=1, names=local, version=3.0):
    """root/latest_checkpointed_iteration.txt and root/iter_0000007/mp_rank_..., as ranks of that layout save them."""
    weights = load_file(arch.folder / "model.safetensors")
    layers = LAYERS[pipeline * virtual]
    sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "expert_tensor": tensor}
    args, _ = arguments_of(arch, torch.float32, {f"{axis}_model_parallel_size": n for axis, n in sizes.items()})
    args.expert_tensor_parallel_size, args.model_type = tensor, ModelType.encoder_or_decoder
    for t in range(tensor):
        for p in range(pipeline):
            for e in range(expert):
                place = Place(t, tensor, p, pipeline, layers, e, expert, t, tensor)
                models = [{} for _ in range(virtual)]
                for name, whole, parts in entries(arch, place):
                    number, _, name = name.partition(".")
                    models[int(number)][names(name)] = slice_of(arch, weights, whole, parts, place)
                for model in models:
                    model[next(iter(model)).rpartition(".")[0] + "._extra_state"] = None
                keys = ["model"] if virtual == 1 else [f"model{n}" for n in range(virtual)]
                state = dict(zip(keys, map(nested, models) if names is old else models, strict=True))
                state |= {"args": args, "checkpoint_version": version, "iteration": 7}
                state["rng_state"] = [{"random": random.getstate(), "np": np.random.get_state()}]
                folder = (
                    f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") + (f"_{e:03d}" if expert > 1 else "")
                )
                (root / "iter_0000007" / folder).mkdir(parents=True)
                with megatron_there():
                    torch.save(state, root / "iter_0000007" / folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root / "iter_0000007"


# ---- the tests


def same_bits(weights, folder):
    weights.check()
    wanted = load_file(folder / "model.safetensors")
    assert wanted.keys() == shapes(weights.arch).keys()
    for name, tensor in wanted.items():
        assert weights.dtype(name) == tensor.dtype and torch.equal(weights.read(name), tensor), name
        if tensor.ndim == 2:
            assert torch.equal(weights.read(name, 0, 1, 2), tensor[1:3]), name
            assert torch.equal(weights.read(name, 1, 3, 5), tensor[:, 3:8]), name


LAYOUTS = [
    {}, {"tensor": 2}, {"tensor": 6}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2, "virtual": 2}, {"expert": 2},
    {"tensor": 2, "expert": 2}, {"pipeline": 2, "expert": 4},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("names", [local, fused, old])
def test_the_same_bits(folders, tmp_path, names, layout):
    for name in NAMES:
        if ("expert" in layout and name != "mixtral") or (names is old and name == "mixtral") or \
                (name == "mixtral" and layout == {"tensor": 6}):  # fmt: skip
            continue
        arch = read_architecture(folders[name])
        folder = write(arch, tmp_path / name, names=names, **layout)
        weights = LegacyCheckpoint(arch, folder, allow_pickle=True)
        same_bits(weights, folders[name])
        sizes = {"tensor": 1, "pipeline": 1, "expert": 1} | {k: v for k, v in layout.items() if k != "virtual"}
        assert weights.stored()["ranks"] == sizes


def test_by_itself_and_with_permission_alone(folders, tmp_path):
    write(read_architecture(folders["mixtral"]), tmp_path, tensor=2, expert=2)
    found = find_checkpoint(tmp_path)
    assert (found.kind, found.home) == ("legacy", None)
    with pytest.raises(ConfigError, match=r"iter_0000007 holds pickles, which may run anything .*--allow-pickle"):
        config_of(found)
    arch = architecture_of(config_of(found, allow_pickle=True), tmp_path)
    same_bits(open_weights(arch, allow_pickle=True), folders["mixtral"])
    with pytest.raises(ConfigError, match=r"holds pickles"):
        open_weights(arch)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def lose(folder):
    shutil.rmtree(folder / "mp_rank_01_000")


def cut_short(folder):
    file = folder / "mp_rank_01_001" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-5000])


def poison(folder):
    torch.save({"model": {}, "args": Evil()}, folder / "mp_rank_00_001" / "model_optim_rng.pt")


def changed(folder, change):
    file = folder / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    change(state["model"])
    torch.save(state, file)


def forget(folder):
    changed(folder, lambda model: model.pop("decoder.layers.0.mlp.linear_fc2.weight"))


def add(folder):
    changed(folder, lambda model: model.update({"decoder.layers.0.mlp.linear_fc3.weight": torch.zeros(2)}))


def narrow(folder):
    changed(folder, lambda model: model.update({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(48, 30)}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, r"holds 3 folders mp_rank_\.\.\. and none of tensor rank 1, pipeline rank 0, expert rank 0; copy"),
        (cut_short, r"mp_rank_01_001/model_optim_rng\.pt is damaged \(.*\); copy the checkpoint again"),
        (poison, r"model_optim_rng\.pt holds (posix|os|nt)\.system, which is neither a weight nor a setting"),
        (
            forget,
            r"layers\.1\.mlp\.linear_fc2\.weight of tensor rank 1 is not there, config\.json's model has \(48, 36\)",
        ),
        (
            add,
            r"holds 1 tensors that config\.json does not account for, the first is decoder\.layers\.1\.mlp\.linear_fc3",
        ),
        (narrow, r"linear_fc2\.weight of tensor rank 1 has shape \(48, 30\), config\.json's model has \(48, 36\)"),
    ],
)
def test_damage_is_told_in_a_sentence(folders, tmp_path, damage, words):
    arch = read_architecture(folders["qwen2"])
    folder = write(arch, tmp_path, tensor=2, pipeline=2)
    with megatron_there():
        damage(folder)
    with pytest.raises(ConfigError, match=words):
        LegacyCheckpoint(arch, folder, allow_pickle=True).check()


def test_the_order_of_old_versions_is_refused(folders, tmp_path):
    arch = read_architecture(folders["qwen2"])
    folder = write(arch, tmp_path, version=1.0)
    with pytest.raises(ConfigError, match=r"checkpoint version 1\.0, whose queries, keys and values lie in another"):
        LegacyCheckpoint(arch, folder, allow_pickle=True)
