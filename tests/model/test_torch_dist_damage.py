"""Distributed checkpoints that are damaged or of another model, and what reading and writing one takes of memory."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_family

from grpo_mega.errors import ConfigError
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats import open_weights
from grpo_mega.model.formats.hugging_face import Folder
from grpo_mega.model.formats.torch_dist import MegatronCheckpoint, read_settings
from grpo_mega.model.formats.torch_dist_writer import Layout, write_torch_dist
from grpo_mega.model.names import shapes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name) for name in ("llama3", "qwen2")}


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """Of each family a checkpoint."""
    root, made = tmp_path_factory.mktemp("written"), {}
    for name, folder in folders.items():
        write_torch_dist(
            Folder(read_architecture(folder)), root / name, Layout(tensor=2), transformer_engine_names=False
        )
        made[name] = root / name / "release"
    return made


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def lose(folder):
    (folder / "__1_0.distcp").unlink()


def cut_short(folder):
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def spoil(folder):
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))


def rename(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    tensors = metadata.state_dict_metadata
    tensors["decoder.layers.mlp.linear_fc3.weight"] = tensors.pop("decoder.layers.mlp.linear_fc2.weight")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def add(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    tensors = metadata.state_dict_metadata
    tensors["decoder.layers.mlp.linear_fc3.weight"] = tensors["decoder.layers.mlp.linear_fc2.weight"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def forget_a_chunk(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Evil()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def halve(folder):
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:1000])


def retag(folder):
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, r"__1_0\.distcp is not there, and \.metadata says that .* lies in it .*; copy the checkpoint again"),
        (cut_short, r"distcp has \d+ bytes, and \.metadata says that .* lies in it from byte .*; copy"),
        (spoil, r"distcp \(bytes \d+ to \d+\) is damaged \(.*\); copy the checkpoint again"),
        (
            rename,
            r"lacks decoder\.layers\.0\.mlp\.linear_fc2\.weight, which is model\.layers\.0\.mlp\.down_proj\.weight",
        ),
        (add, r"holds 1 tensors that config\.json does not account for, the first is .*linear_fc3\.weight; is config"),
        (forget_a_chunk, r"the chunks of decoder\.layers\.mlp\.linear_fc1\.weight hold \d+ numbers, its shape .* has"),
        (poison, r"\.metadata holds (posix|os|nt)\.system, which has no place .*: it was not read"),
        (halve, r"\.metadata is damaged \(.*\); copy the checkpoint again"),
        (retag, r"metadata\.json says sharded_backend='zarr'; save the checkpoint as torch_dist"),
    ],
)
def test_damage_is_told_in_a_sentence(folders, saved, tmp_path, damage, words):
    shutil.copytree(saved["qwen2"], tmp_path / "damaged")
    damage(tmp_path / "damaged")
    arch = read_architecture(folders["qwen2"])
    with pytest.raises(ConfigError, match=words):
        weights = MegatronCheckpoint(arch, tmp_path / "damaged")
        weights.check()
        for name in shapes(arch):
            weights.read(name)


def test_another_model_is_refused(folders, saved):
    with pytest.raises(ConfigError, match=r"lacks .*linear_qkv\.bias, which is .*q_proj\.bias and .*; is config"):
        MegatronCheckpoint(read_architecture(folders["qwen2"]), saved["llama3"]).check()
    arch = read_architecture(folders["llama3"])
    raw = arch.raw | {"intermediate_size": 80}
    with pytest.raises(
        ConfigError, match=r"linear_fc1\.weight has shape \(3, 144, 48\), config\.json says \(3, 160, 48\)"
    ):
        MegatronCheckpoint(architecture_of(raw, arch.folder), saved["llama3"]).check()


def test_settings_hold_no_strangers(saved, tmp_path):
    shutil.copytree(saved["qwen2"], tmp_path / "made")
    common = tmp_path / "made" / "common.pt"
    torch.save({"args": Evil()}, common)
    with pytest.raises(ConfigError, match=r"common\.pt holds (posix|os|nt)\.system, which is neither a weight nor"):
        read_settings(common.parent)


# ---- memory: in a process of its own, whose peak is nothing else's


def measure(root: Path) -> None:
    """Write a model of random numbers and read it again; print its bytes, and by how many the process grew."""
    import json
    import resource

    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    (root / "seed").mkdir(parents=True)
    (root / "seed" / "config.json").write_text(json.dumps(config))
    arch = read_architecture(root / "seed")
    known = shapes(arch)
    column = torch.arange(4096, dtype=torch.float32)

    class Numbers:
        """Weights that are made when they are read."""

        def __init__(self):
            self.arch = arch

        def dtype(self, name):
            return torch.float32

        def read(self, name, dim=0, start=0, length=None):
            shape = list(known[name])
            shape[dim] = shape[dim] - start if length is None else length
            first = [start if axis == dim else 0 for axis in range(len(shape))]
            rows = 4096 * torch.arange(first[0], first[0] + shape[0], dtype=torch.float32) + len(name)
            return rows if len(shape) == 1 else rows[:, None] + column[first[1] : first[1] + shape[1]]

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    made, numbers = root / "made", Numbers()
    torch.save(torch.zeros(10), root / "warm.pt")
    before = peak()
    write_torch_dist(numbers, made, Layout(tensor=2, pipeline=3))
    wrote = peak() - before
    weights = open_weights(read_architecture(made))
    weights.check()
    for name in known:
        assert torch.equal(weights.read(name), numbers.read(name)), name
    size = sum(file.stat().st_size for file in made.rglob("*.distcp"))
    print(size, wrote, peak() - before)


def test_memory_is_that_of_a_chunk(tmp_path):
    """The model has 640 MB, its largest chunk (half of gate or of up, of the vocabulary) 8 to 17."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, wrote, grew = map(int, done.stdout.split())
    assert size > 600e6
    assert wrote < 0.15 * size and grew < 0.25 * size, (size, wrote, grew)


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
