"""A training checkpoint is a model by itself: it can be converted, and another run can begin from it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from grpo_mega.config import validate_recipe
from grpo_mega.convert.describe import describe
from grpo_mega.convert.source import open_source
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats import open_weights
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.trainer import main


def length(text, answer, row):
    return len(text) % 3


def train(tree):
    main.train(validate_recipe(tree))


LAYOUTS = {
    "tensor": {"parallel": {"tensor": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "distributed": {"precision": {"dtype": "bf16"}, "optimizer": {"lr": 0.01, "distributed": True}},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_is_a_model_by_itself(ranks, tmp_path, name):
    """Its weights are those of the run's export; states of either optimizer are not taken for a part of the model."""
    shape = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(tmp_path / "model", num_key_value_heads=2, **shape)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 6)))
    tree = {
        "model": {"path": str(model)},
        "data": {"jsonl": str(data), "heldout": 0},
        "reward": {"function": f"{__name__}:length"},
        "sampling": {"max_completion_tokens": 5},
        "grpo": {"group_size": 4},
        "batch": {"prompts_per_step": 4},
        "optimizer": {"lr": 0.01},
        "run": {"directory": str(tmp_path / "run"), "num_steps": 2},
    } | LAYOUTS[name]
    ranks(2, train, tree)
    found = find_checkpoint(tmp_path / "run")
    assert (found.kind, found.folder) == ("torch_dist", tmp_path / "run" / "checkpoints" / "step_2")
    assert found.home == found.folder
    assert {each.name for each in found.folder.iterdir()} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    arch = read_architecture(found.folder)
    weights = open_weights(arch)
    weights.check()
    wanted, before = (load_file(path / "model.safetensors") for path in (tmp_path / "run" / "hf", model))
    for key, tensor in wanted.items():
        assert torch.equal(weights.read(key), tensor), key
        assert not torch.equal(tensor, before[key].to(tensor.dtype)), key
        assert arch.raw["dtype"] == str(tensor.dtype).removeprefix("torch.")
    assert any("exp_avg_sq" in entry for entry in weights.metadata.state_dict_metadata)

    tree["model"] = {"path": str(found.folder)}  # and a run begins there
    tree["run"] = {"directory": str(tmp_path / "again"), "num_steps": 2}
    ranks(2, train, tree)
    assert (tmp_path / "again" / "hf" / "model.safetensors").is_file()
    source = open_source(tmp_path / "run", tmp_path / "scratch")
    state = describe(source)["state"]
    sizes = validate_recipe(tree).parallel.sizes
    assert state["step"] == 2 and state["layout"] == {axis: size for axis, size in sizes.items() if size}
    assert state["prompts"]["cursor"] > 0
