"""Megatron's distributed checkpoints: what megatron-core saves we read, what we write it loads, every bit of it."""

from __future__ import annotations

import shutil

import pytest
import torch
from families import make_family
from safetensors.torch import load_file

from grpo_mega.config import ParallelConfig
from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import padded_vocab_size
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats import config_of, open_weights
from grpo_mega.model.formats.find import find_checkpoint
from grpo_mega.model.formats.hugging_face import Folder
from grpo_mega.model.formats.torch_dist import MegatronCheckpoint, read_metadata, read_settings
from grpo_mega.model.formats.torch_dist_writer import Layout, TorchDistWriter, megatron_padding, write_torch_dist
from grpo_mega.model.names import shapes
from grpo_mega.parallel.mesh import initialize, temporary_groups

NAMES = ("llama3", "qwen2", "mixtral")
ODD = ("qwen3_moe-raw", "deepseek_v3", "gemma3")  # layers of several kinds, latent attention, norms behind linears
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
    made = {name: make_family(root / name, name, num_hidden_layers=4) for name in NAMES}  # an interleaved pipeline's
    return made | {name: make_family(root / name, name) for name in ODD}


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


def stock(mesh, parallel, folder, to_load, to_save):
    """What megatron-core's own local layers, as Megatron-LM builds them, load otherwise than the Hugging Face folder
    says (where there is something to load); and what they save."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from grpo_mega.model import bridge
    from grpo_mega.model.build import transformer_config
    from grpo_mega.model.specs import ModelParts

    arch = read_architecture(folder)
    model = GPTModel(
        transformer_config(arch, parallel, torch.float32, mesh.device),
        get_gpt_layer_local_spec(num_experts=arch.num_experts or None, normalization="RMSNorm"),
        vocab_size=megatron_padding(arch.vocab_size, 1),
        max_sequence_length=64,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
    )
    for row in (model.embedding.word_embeddings, model.output_layer):
        if row.weight is not None:  # the size that the bridge knows
            row.weight = torch.nn.Parameter(row.weight[: padded_vocab_size(arch.vocab_size, 1)].clone())
    place = bridge.Place.of(mesh, (arch.num_layers,))
    bridge.load(ModelParts([model]), arch, place)
    to_save.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(to_save))
    if to_load is None:
        return []
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(to_load))["model"])
    pairs = zip(model.named_parameters(), wanted, strict=True)
    return [name for (name, found), right in pairs if not torch.equal(found, right)]


def stock_all(folders, written, root):
    return {name: under("one", stock, folders[name], written.get(name), root / name) for name in folders}


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
            assert torch.equal(weights.read(name, 1, 3, 5), tensor[:, 3:8]), name


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """(family, layout) -> what megatron-core saved under it."""
    import ranks

    root = tmp_path_factory.mktemp("saved")
    todo = {1: cases(1), 2: [*cases(2), *((name, "tensor") for name in ODD)]}
    for world, each in todo.items():
        ranks.ranks(world, save_all, folders, each, root, timeout=200)
    return {(name, layout): root / f"{name}-{layout}" for name, layout in (*todo[1], *todo[2])}


def test_what_megatron_saves_under_any_layout_is_read(folders, saved):
    for (name, _), folder in saved.items():
        weights = MegatronCheckpoint(read_architecture(folders[name]), folder)
        same_bits(weights, folders[name])
        assert any(entry.endswith("linear_proj._extra_state") for entry in weights.dropped())
    assert len(saved) == 3 * 4 + 2 + 3


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
        (tensors, objects), (their_tensors, their_objects) = map(described, (destination / "release", theirs))
        assert tensors == their_tensors, (name, layout)
        spare = {key for key in objects if "_down_proj." in key}  # linears of Megatron-LM's, not of our layer spec
        assert objects - spare == their_objects, (name, layout)
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


def test_megatrons_own_layers_load_what_is_written_and_are_read(ranks, folders, tmp_path):
    """By the names that Transformer Engine's layers have; only before experts do its local layers use others."""
    made = {}
    for name in ("llama3", "qwen2"):
        write_torch_dist(Folder(read_architecture(folders[name])), tmp_path / name, Layout(tensor=2))
        made[name] = tmp_path / name / "release"
    tried = {name: folders[name] for name in NAMES}
    assert ranks(1, stock_all, tried, made, tmp_path / "saved") == [{name: [] for name in NAMES}]
    for name in NAMES:
        weights = MegatronCheckpoint(read_architecture(folders[name]), tmp_path / "saved" / name)
        assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in weights.metadata.state_dict_metadata
        same_bits(weights, folders[name])


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_is_built_from_a_megatron_folder(ranks, folders, written, world):
    """tensor 2 reads what tensor 6 wrote: no chunk is a slice."""
    sources = {name: made[3] for name, made in written.items()}
    for found in ranks(world, build_all, folders, cases(world), sources, timeout=200):
        assert not any(found.values()), found


@pytest.mark.parametrize("name", [*NAMES, *ODD])
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
    assert bool(writers[0].unsaid) == (name in ("llama3", "deepseek_v3", "gemma3"))
    writers[0].finish([writer.write(rank, 3) for rank, writer in enumerate(writers)])
    assert not destination.exists()
    writers[0].publish()
    again = open_weights(read_architecture(destination))
    assert isinstance(again, MegatronCheckpoint)
    same_bits(again, folders[name])
    keys = again.metadata.state_dict_metadata.keys()
    numbered = len({arch.is_mixture(number) for number in range(arch.num_layers)}) > 1
    layer, count = ("decoder.layers.1.", 1) if numbered else ("decoder.layers.", arch.num_layers)
    mla = arch.latent is not None
    names = ["linear_kv_up_proj.layer_norm_weight" if mla else "linear_qkv.layer_norm_weight"]
    names.append(f"core_attention._extra_state/shard_0_{count}")
    for each in names:
        assert (f"{layer}self_attention.{each}" in keys) == fused
    assert (f"{layer}mlp.linear_fc1.layer_norm_weight" in keys) == (fused and not arch.is_mixture(1))
    assert {file.name for file in destination.iterdir()} >= {"config.json", "tokenizer.json", "release"}
    size = megatron_padding(arch.vocab_size, 2)
    assert size == 512 and again.metadata.state_dict_metadata["embedding.word_embeddings.weight"].size[0] == size
    args = read_settings(destination / "release")["args"]
    assert (args.padded_vocab_size, args.tensor_model_parallel_size, args.num_layers) == (512, 2, arch.num_layers)


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
