"""Megatron's distributed checkpoints: what megatron-core saves we read, what we write it loads, every bit of it."""

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
from safetensors.torch import load_file

from grpo_mega.config import ParallelConfig
from grpo_mega.errors import ConfigError
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats import config_of, open_weights
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.model.formats.hugging_face import Folder
from grpo_mega.model.formats.torch_dist import MegatronCheckpoint, read_metadata, read_settings
from grpo_mega.model.formats.torch_dist_writer import Layout, TorchDistWriter, megatron_padding, write_torch_dist
from grpo_mega.model.names import shapes
from grpo_mega.parallel.mesh import initialize, temporary_groups

NAMES = ("llama3", "qwen2", "mixtral")
LAYOUTS = {  # of the ranks that save and load -> how many there are
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "expert": (2, {"expert": 2}),
    "expert_tensor": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1, "sequence": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    # four layers: an interleaved pipeline of two ranks needs them
    return {name: make_family(root / name, name, num_hidden_layers=4) for name in (*NAMES, "qwen3_moe-raw")}


def cases(world):
    """(family, layout) of every model that so many ranks can hold."""
    return [
        (name, layout)
        for name in NAMES
        for layout, (size, cut) in LAYOUTS.items()
        if size == world and (name == "mixtral" or "expert" not in cut)
    ]


# ---- on the ranks


@temporary_groups()
def under(layout, action, *args):
    """action(mesh, parallel, *args) under a layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(**LAYOUTS[layout][1])
    return action(initialize(**parallel.sizes), parallel, *args)


def sharded(model, metadata=None):
    """(key in the state, part of the model, its sharded state)."""
    parts = list(model)
    for number, module in enumerate(parts):
        key = "model" if len(parts) == 1 else f"model{number}"
        yield key, module, module.sharded_state_dict(metadata=None if metadata is None else dict(metadata))


def save(mesh, parallel, folder, destination, metadata=None):
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from grpo_mega.model.build import build_model

    if mesh.is_writer:
        destination.mkdir(parents=True)
    dist.barrier()
    model = build_model(read_architecture(folder), mesh, parallel, trainable=False)
    dist_checkpointing.save({key: state for key, _, state in sharded(model, metadata)}, str(destination))
    dist.barrier()


def save_all(folders, todo, root, metadata=None):
    for name, layout in todo:
        under(layout, save, folders[name], root / f"{name}-{layout}", metadata)


def load(mesh, parallel, folder, source):
    """Names of parameters that megatron-core fills otherwise than the Hugging Face folder does."""
    from megatron.core import dist_checkpointing

    from grpo_mega.model.build import build_model

    arch = read_architecture(folder)
    wanted = build_model(arch, mesh, parallel, trainable=False)
    model = build_model(arch, mesh, parallel, trainable=False, loaded=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = {key: part for key, _, part in sharded(model)}
    loaded = dist_checkpointing.load(state, str(source))
    for key, module, _ in sharded(model):
        module.load_state_dict(loaded[key])
    pairs = zip(model.named_parameters(), wanted.parameters(), strict=True)
    return [name for (name, found), right in pairs if not torch.equal(found, right)]


def load_all(folders, todo, written):
    return {
        (*case, number): under(case[1], load, folders[case[0]], source)
        for case in todo
        for number, source in enumerate(written[case[0]])
    }


def build_from_megatron(mesh, parallel, folder, source):
    """The same for our own way from a Megatron folder to a model."""
    from grpo_mega.model.build import build_model

    models = [build_model(read_architecture(path), mesh, parallel, trainable=False) for path in (folder, source)]
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    return [name for (name, right), found in pairs if not torch.equal(found, right)]


def build_all(folders, todo, written):
    return {case: under(case[1], build_from_megatron, folders[case[0]], written[case[0]]) for case in todo}


# ---- in the parent


def same_bits(weights, folder):
    weights.check()
    wanted = load_file(folder / "model.safetensors")
    assert wanted.keys() == shapes(weights.arch).keys()
    for name, tensor in wanted.items():
        assert weights.dtype(name) == tensor.dtype
        assert torch.equal(weights.read(name), tensor), name
        if tensor.ndim == 2:
            assert torch.equal(weights.read(name, 0, 1, 2), tensor[1:3]), name
            assert torch.equal(weights.read(name, 1, 5, 11), tensor[:, 5:16]), name


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """(family, layout) -> what megatron-core saved under it."""
    import ranks

    root = tmp_path_factory.mktemp("saved")
    for world in (1, 2):
        ranks.ranks(world, save_all, folders, cases(world), root, timeout=200)
    return {(name, layout): root / f"{name}-{layout}" for world in (1, 2) for name, layout in cases(world)}


def test_what_megatron_saves_under_any_layout_is_read(folders, saved):
    for (name, _), folder in saved.items():
        weights = MegatronCheckpoint(read_architecture(folders[name]), folder)
        same_bits(weights, folders[name])
        assert "decoder.layers.self_attention.linear_qkv._extra_state" in weights.dropped()
    assert len(saved) == 3 * 4 + 2


def test_experts_and_layers_under_keys_of_their_own_are_read(ranks, folders, tmp_path):
    ranks(1, save_all, folders, [("mixtral", "one"), ("qwen2", "one")], tmp_path, {"singleton_local_shards": True})
    for name, key in (("mixtral", "mlp.experts.experts.3.linear_fc1.weight_w"), ("qwen2", "mlp.linear_fc1.weight_v")):
        weights = MegatronCheckpoint(read_architecture(folders[name]), tmp_path / f"{name}-one")
        assert f"decoder.layers.2.{key}" in weights.metadata.state_dict_metadata
        same_bits(weights, folders[name])


def described(folder):
    """Of every tensor its dtype, shape and chunks, and the objects: but for the vocabulary's rows."""
    tensors, objects = {}, set()
    for key, entry in read_metadata(folder).state_dict_metadata.items():
        if type(entry).__name__ == "BytesStorageMetadata":
            objects.add(key)
        elif "embedding" in key or "output_layer" in key:
            tensors[key] = entry.properties.dtype, entry.size[1:], len(entry.chunks)
        else:
            chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            tensors[key] = entry.properties.dtype, entry.size, chunks
    return tensors, objects - {"common_state/shard_0_1"}


def layout_of(cut):
    return Layout(*(cut.get(axis, default) for axis, default in (("tensor", 1), ("pipeline", 1), ("expert", 1))),
                  cut.get("expert_tensor"))  # fmt: skip


def test_what_is_written_is_cut_as_megatron_cuts_it(folders, saved, tmp_path):
    for (name, layout), theirs in saved.items():
        if layout == "interleaved":
            continue  # cut like a pipeline of as many ranks
        destination = tmp_path / f"{name}-{layout}"
        source = Folder(read_architecture(folders[name]))
        write_torch_dist(source, destination, layout_of(LAYOUTS[layout][1]), transformer_engine_names=False)
        assert described(destination / "release") == described(theirs), (name, layout)
        ours = {file.name.split("_")[2] for file in (destination / "release").glob("*.distcp")}
        if layout in ("tensor", "pipeline", "expert"):
            assert ours == {"0", "1"}  # a file of each rank


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """Of each family, checkpoints of ours: under four layouts, with the names of our own layer spec."""
    root, made = tmp_path_factory.mktemp("written"), {}
    for name in NAMES:
        weights = Folder(read_architecture(folders[name]))
        layouts = [Layout(), Layout(tensor=2), Layout(pipeline=2)]
        layouts.append(Layout(tensor=6, expert=4, expert_tensor=2) if name == "mixtral" else Layout(tensor=6))
        made[name] = []
        for number, layout in enumerate(layouts):
            destination = root / f"{name}-{number}"
            write_torch_dist(weights, destination, layout, transformer_engine_names=False)
            made[name].append(destination)
    return made


@pytest.mark.parametrize("world", [1, 2])
def test_megatron_loads_what_is_written_under_any_layout(ranks, folders, written, world):
    releases = {name: [folder / "release" for folder in made] for name, made in written.items()}
    todo = [case for case in cases(world) if case[1] != "interleaved" or case[0] == "llama3"]
    for found in ranks(world, load_all, folders, todo, releases, timeout=250):
        assert len(found) == 4 * len(todo)
        assert not any(found.values()), found


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_is_built_from_a_megatron_folder(ranks, folders, written, world):
    """tensor 2 reads what tensor 6 wrote: no chunk is a slice."""
    sources = {name: made[3] for name, made in written.items()}
    for found in ranks(world, build_all, folders, cases(world), sources, timeout=200):
        assert not any(found.values()), found


@pytest.mark.parametrize("name", [*NAMES, "qwen3_moe-raw"])
@pytest.mark.parametrize("fused", [False, True])
def test_there_and_back_by_several_processes(folders, tmp_path, name, fused):
    arch = read_architecture(folders[name])
    weights = Folder(arch)
    dtypes = {each: weights.dtype(each) for each in shapes(arch)}
    layout, destination = Layout(tensor=2, pipeline=2, expert=2 if arch.num_experts else 1), tmp_path / "made"
    writers = [
        TorchDistWriter(weights, destination, layout, dtypes, transformer_engine_names=fused, begins=rank == 0)
        for rank in range(3)
    ]
    assert not writers[0].unsaid or name == "llama3"
    writers[0].finish([writer.write(rank, 3) for rank, writer in enumerate(writers)])
    assert not destination.exists()
    writers[0].publish()
    again = open_weights(read_architecture(destination))
    assert isinstance(again, MegatronCheckpoint)
    same_bits(again, folders[name])
    keys = again.metadata.state_dict_metadata.keys()
    layer = "decoder.layers.1." if name == "qwen3_moe-raw" else "decoder.layers."
    dense = not arch.is_mixture(1)
    assert (f"{layer}self_attention.linear_qkv.layer_norm_weight" in keys) == fused
    assert (f"{layer}mlp.linear_fc1.layer_norm_weight" in keys) == (fused and dense)
    assert (f"{layer}self_attention.core_attention._extra_state/shard_0_{1 if 'raw' in name else 4}" in keys) == fused
    assert {file.name for file in destination.iterdir()} >= {"config.json", "tokenizer.json", "release"}
    size = megatron_padding(arch.vocab_size, 2)
    assert size == 512 and again.metadata.state_dict_metadata["embedding.word_embeddings.weight"].size[0] == size
    args = read_settings(destination / "release")["args"]
    assert (args.padded_vocab_size, args.tensor_model_parallel_size, args.num_layers) == (512, 2, 4)


def test_another_dtype_and_tensors_of_two(folders, tmp_path):
    weights = Folder(read_architecture(folders["qwen2"]))
    write_torch_dist(weights, tmp_path / "bf16", Layout(tensor=2), dtype=torch.bfloat16)
    again = open_weights(read_architecture(tmp_path / "bf16"))
    for name, tensor in load_file(folders["qwen2"] / "model.safetensors").items():
        assert torch.equal(again.read(name), tensor.bfloat16())
    assert read_architecture(tmp_path / "bf16").raw["dtype"] == "bfloat16"
    mixed = {name: torch.float32 if "q_proj" in name else torch.bfloat16 for name in shapes(weights.arch)}
    with pytest.raises(
        ConfigError, match=r"q_proj.*in one tensor, and they are of several types .*give all of them one"
    ):
        TorchDistWriter(weights, tmp_path / "mixed", Layout(), mixed)


def test_a_folder_without_config_json_says_which_model_it_is(folders, written, tmp_path):
    for name in ("qwen2", "mixtral"):
        copy = tmp_path / name
        shutil.copytree(written[name][1], copy)
        (copy / "config.json").unlink()
        found = find_checkpoint(copy)
        assert found.home is None
        arch = architecture_of(config_of(found), copy)
        same_bits(open_weights(arch), folders[name])


def test_what_a_folder_is(folders, written, saved, tmp_path):
    made = written["qwen2"][0]
    assert find_checkpoint(folders["qwen2"]).kind == "huggingface"
    for path in (made, made / "release"):
        found = find_checkpoint(path)
        assert (found.kind, found.folder, found.home) == ("torch_dist", made / "release", made)
    run = tmp_path / "run"
    shutil.copytree(saved["qwen2", "one"], run / "checkpoints" / "step_3")
    (run / "checkpoints" / "latest").write_text("step_3\n")
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_3"):
        assert find_checkpoint(path).folder == run / "checkpoints" / "step_3"
    (tmp_path / "iterations" / "iter_0000123" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iterations" / "latest_checkpointed_iteration.txt").write_text("123")
    assert find_checkpoint(tmp_path / "iterations").kind == "legacy"
    (tmp_path / "iterations" / "latest_checkpointed_iteration.txt").write_text("124")
    with pytest.raises(ConfigError, match=r"iterations names .*iter_0000124 its latest, which holds no weights; give"):
        find_checkpoint(tmp_path / "iterations")
    (tmp_path / "iterations" / "latest_checkpointed_iteration.txt").write_text("many")
    with pytest.raises(ConfigError, match=r"says 'many'; write release or the number"):
        find_checkpoint(tmp_path / "iterations")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def lose(folder):
    (folder / "__0_0.distcp").unlink()


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
        (lose, r"__0_0\.distcp is not there, and \.metadata says that .* lies in it .*; copy the checkpoint again"),
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
    shutil.copytree(saved["qwen2", "one"], tmp_path / "damaged")
    damage(tmp_path / "damaged")
    arch = read_architecture(folders["qwen2"])
    with pytest.raises(ConfigError, match=words):
        weights = MegatronCheckpoint(arch, tmp_path / "damaged")
        weights.check()
        for name in shapes(arch):
            weights.read(name)


def test_another_model_is_refused(folders, saved):
    with pytest.raises(ConfigError, match=r"lacks .*linear_qkv\.bias, which is .*q_proj\.bias and .*; is config"):
        MegatronCheckpoint(read_architecture(folders["qwen2"]), saved["llama3", "one"]).check()
    arch = read_architecture(folders["llama3"])
    raw = arch.raw | {"intermediate_size": 80}
    with pytest.raises(
        ConfigError, match=r"linear_fc1\.weight has shape \(4, 144, 48\), config\.json says \(4, 160, 48\)"
    ):
        MegatronCheckpoint(architecture_of(raw, arch.folder), saved["llama3", "one"]).check()


def test_settings_hold_no_strangers(written, tmp_path):
    shutil.copytree(written["qwen2"][0], tmp_path / "made")
    common = tmp_path / "made" / "release" / "common.pt"
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
