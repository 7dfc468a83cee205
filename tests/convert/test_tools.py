"""tools/inspect_checkpoint.py and tools/compare_checkpoints.py, as they are run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from families import make_family
from safetensors.torch import load_file, save_file

TOOLS = Path(__file__).resolve().parents[2] / "tools"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def tool(monkeypatch, capsys):
    """(exit code, standard output, standard error) of a tool."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_inspect(tool, folder):
    code, words, _ = tool("inspect_checkpoint.py", folder)
    assert code == 0
    for part in (
        "huggingface, Qwen2ForCausalLM", "num_layers 3, num_heads 6, num_kv_heads 2", "39 tensors",
        "tokenizer: 259 tokens",
        "stops at 258", "model.layers.N.self_attn.q_proj.bias", "[72, 48]  x 3", "no report beside it",
    ):  # fmt: skip
        assert part in words, part
    assert UP not in words and UP in tool("inspect_checkpoint.py", folder, "--tensors")[1]
    found = json.loads(tool("inspect_checkpoint.py", folder, "--json")[1])
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert (found["parameters"], found["tensor_bytes"], found["stored"]["stored as"]) == (
        numbers,
        4 * numbers,
        {"F32": 39},
    )
    code, _, error = tool("inspect_checkpoint.py", folder / "nowhere")
    assert code == 2 and "does not exist; give a Hugging Face folder" in error


def test_compare(tool, original, folder):
    assert tool("compare_checkpoints.py", original, folder)[:2] == (
        0,
        "39 tensors: 39 the same, 0 within tolerance, 0 differ\n",
    )
    tensors = load_file(folder / "model.safetensors")
    tensors[UP] = 1.001 * tensors[UP]
    tensors["model.norm.weight"][5] += 0.25
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, words, _ = tool("compare_checkpoints.py", original, folder)
    assert code == 1 and "39 tensors: 35 the same, 0 within tolerance, 4 differ" in words
    assert f"{UP}: largest difference" in words and "relative 1.00e-03" in words
    assert "model.norm.weight: largest difference 2.50e-01, mean 5.21e-03" in words  # 0.25 / 48
    assert "lm_head.weight: the same numbers as float32 and float64" in words
    rows = {row["name"]: row for row in json.loads(tool("compare_checkpoints.py", original, folder, "--json")[1])}
    assert rows[UP]["relative"] == pytest.approx(1e-3, rel=1e-3) and rows["model.norm.weight"]["max_difference"] == 0.25
    code, words, _ = tool("compare_checkpoints.py", original, folder, "--tolerance", "0.01")
    assert code == 1 and "2 within tolerance, 2 differ" in words  # the norm, and the output layer's type


def test_compare_models_of_other_shapes(tool, original, tmp_path):
    other = make_family(tmp_path / "other", "qwen2", num_hidden_layers=2, intermediate_size=80)
    code, words, _ = tool("compare_checkpoints.py", original, other)
    assert code == 1 and f"{UP}: shapes (72, 48) and (80, 48)" in words
    assert f"model.layers.2.mlp.up_proj.weight: only in {original}" in words


def test_pickled_weights_need_the_flag(tool, original, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    code, _, error = tool("inspect_checkpoint.py", folder)
    assert code == 2 and "a pickle, which may run anything when it is read" in error and "--allow-pickle" in error
    assert tool("compare_checkpoints.py", original, folder, "--allow-pickle")[0] == 0
    torch.save({**tensors, "run": print}, folder / "pytorch_model.bin")
    code, _, error = tool("compare_checkpoints.py", original, folder, "--allow-pickle")
    assert code == 2 and "pytorch_model.bin cannot be read: it holds print, which is no weight" in error
