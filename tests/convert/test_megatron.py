"""`grpo-mega convert` to Megatron's format and back, under every kind of layout, with logits of both programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from converting import commands
from families import MODELS, make_family
from safetensors.torch import load_file

SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
LAYOUTS = {
    "tp2": (2, ("llama3", "gemma3", "qwen2", "qwen3"), ("--tensor", "2")),
    "pp2": (2, ("llama", "qwen2-tied", "qwen3_moe"), ("--pipeline", "2")),
    "ep2": (2, ("mixtral", "qwen3_moe-raw"), ("--expert", "2")),
    "etp": (2, ("mixtral", "deepseek_v3"), ("--tensor", "2", "--expert", "2", "--expert-tensor", "1")),
    "local": (1, ("mistral-window", "qwen2-window"), ("--names", "local")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name) for name in MODELS}


def same_bits(made, original):
    found, wanted = (load_file(path / "model.safetensors") for path in (made, original))
    assert found.keys() == wanted.keys(), made
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (made, name)


def test_every_family_there_and_back(ranks, folders, tmp_path):
    several = []
    for name, folder in folders.items():
        several.append((folder, tmp_path / f"{name}-mega", "--skip-logits", "--to", "megatron"))
        several.append((tmp_path / f"{name}-mega", tmp_path / name, "--skip-logits"))
    for arguments, (code, words) in zip(several, ranks(1, commands, several, timeout=200)[0], strict=True):
        assert code == 0, (arguments, words)
    for name, folder in folders.items():
        same_bits(tmp_path / name, folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_logits(ranks, folders, tmp_path, layout):
    """There, transformers beside megatron; on to another layout; and back, megatron beside transformers."""
    world, names, arguments = LAYOUTS[layout]
    several = []
    for name in names:
        there, moved = tmp_path / f"{name}-mega", tmp_path / f"{name}-moved"
        several.append((folders[name], there, *arguments))
        several.append((there, moved, "--to", "megatron", "--pipeline", str(world), "--skip-logits"))  # a share each
        several.append((moved, tmp_path / name, "--to", "huggingface", *(arguments if layout != "local" else ())))
    for each in several:
        ((code, words),) = ranks(world, commands, [each], timeout=120)[0]
        assert code == 0, (each, words)
    for name in names:
        same_bits(tmp_path / name, folders[name])
        for folder in (tmp_path / f"{name}-mega", tmp_path / name):
            found = json.loads((folder / "conversion_report.json").read_text())
            assert found["verdict"] == "proved" and found["logits"]["top1_agreement"] == 1.0
            assert found["logits"]["max_difference"] <= 1e-5 and found["logits"]["largest_logit"] > 1
        assert (tmp_path / f"{name}-mega" / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_a_checkpoint_without_config_needs_one(ranks, folders, tmp_path):
    """Gemma cannot be said in Megatron-LM's arguments; Llama can."""
    several = [(folders[name], tmp_path / name, "--to", "megatron", "--skip-logits") for name in ("gemma3", "llama")]
    assert [code for code, _ in ranks(1, commands, several)[0]] == [0, 0]
    for name in ("gemma3", "llama"):
        (tmp_path / name / "config.json").unlink()
    several = [
        (tmp_path / "llama", tmp_path / "a", "--skip-logits"),
        (tmp_path / "gemma3", tmp_path / "b", "--skip-logits"),
        (tmp_path / "gemma3", tmp_path / "c", "--skip-logits", "--config", folders["gemma3"]),
    ]
    (told, told_words), (refused, words), (given, given_words) = ranks(1, commands, several)[0]
    assert (told, given) == (0, 0), told_words + given_words
    same_bits(tmp_path / "a", folders["llama"])
    same_bits(tmp_path / "c", folders["gemma3"])
    assert refused == 2 and "the checkpoint's arguments" in words and "config.json" in words


def test_a_damaged_checkpoint(ranks, folders, tmp_path):
    ((code, _),) = ranks(1, commands, [(folders["llama"], tmp_path / "mega", "--skip-logits")])[0]
    assert code == 0
    made = tmp_path / "mega" / "release"
    file = next(made.glob("*.distcp"))
    copies = {}
    for name in ("gone", "short"):
        copies[name] = shutil.copytree(tmp_path / "mega", tmp_path / name) / "release" / file.name
    copies["gone"].unlink()
    copies["short"].write_bytes(copies["short"].read_bytes()[:-10000])
    several = [(tmp_path / name, tmp_path / "made", "--skip-logits") for name in copies]
    for code, words in ranks(1, commands, several)[0]:
        assert code == 2 and file.name in words and "copy the checkpoint again, whole" in words, words
    assert not list(tmp_path.glob("made*"))


@pytest.mark.skipif(not SMOLLM2.exists(), reason="tools/fetch_smollm2.py makes it, which tests/run.sh calls")
def test_smollm2_for_real(ranks, tmp_path):
    """The quick start's model over two pipeline ranks, with logits, and back."""
    several = [(SMOLLM2, tmp_path / "mega", "--pipeline", "2"), (tmp_path / "mega", tmp_path / "back", "--skip-logits")]
    for each in several:
        ((code, words),) = ranks(2, commands, [each], timeout=200)[0]
        assert code == 0, words
    same_bits(tmp_path / "back", SMOLLM2)
    logits = json.loads((tmp_path / "mega" / "conversion_report.json").read_text())["logits"]
    assert logits["passes"] and logits["top1_agreement"] == 1.0 and logits["max_difference"] <= logits["bound"] / 4
    assert logits["source_loss"] < 4 < logits["chance"]  # it knows its languages
