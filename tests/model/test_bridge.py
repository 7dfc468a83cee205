"""Hugging Face folders in and out: bit-exact under every cut, logits as transformers has them, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from grpo_mega.config import ParallelConfig
from grpo_mega.errors import ConfigError, RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.model.architecture import check_layout
from grpo_mega.model.families import read_architecture
from grpo_mega.model.formats import hugging_face
from grpo_mega.model.names import shapes
from grpo_mega.model.rotary import rope_inverse_frequencies
from grpo_mega.parallel.mesh import initialize

MODELS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "few": {"tied": True, "num_key_value_heads": 2, "head_dim": 6},  # heads wider than hidden / heads
    "small": {"tied": False, "vocab_size": 15, "eos_token_id": 14},  # of 3 tensor ranks the last has no real row
    "scaled": {
        "tied": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip
CUTS = [  # model, tensor, pipeline, stages
    ("tied", 1, 1, None), ("untied", 1, 1, None), ("scaled", 1, 1, None),
    ("tied", 2, 1, None), ("untied", 2, 1, None), ("tied", 1, 2, None), ("untied", 1, 2, (4, 1)),
    ("tied", 3, 1, None), ("small", 3, 1, None), ("untied", 1, 3, (1, 3, 1)),
    ("few", 4, 1, None), ("tied", 2, 2, None), ("untied", 2, 2, (2, 3)),
]  # fmt: skip
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.make_model(root / name, **changes) for name, changes in MODELS.items()}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the tied model, to be spoilt."""
    return shutil.copytree(folders["tied"], tmp_path / "model")


# ---- there and back


def ticks_and_failures(folder, scratch, failing):
    """How far loading and exporting said they were, and how an export ends whose disk fails at once or half-way."""
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage

    mesh = initialize(1, 2)
    arch, seen = read_architecture(folder), {"load": [], "export": []}
    model = build_model(arch, mesh, ParallelConfig(pipeline=2), tick=lambda *far: seen["load"].append(far))
    where = (model, arch, mesh, layers_per_stage(arch, 2))
    bridge.export(*where, scratch / "whole", lambda *far: seen["export"].append(far))
    errors = []

    def lose(done, total):
        if 2 * done > total:
            shutil.rmtree(scratch / "lost.partial", ignore_errors=True)

    for destination, tick in ((failing / "made", bridge.silent), (scratch / "lost", lose)):
        try:
            bridge.export(*where, destination, tick)
            errors.append(None)
        except RunDirectoryError as error:
            errors.append(str(error))
    return seen, errors


def export_and_run(folders, cuts, destination, shard_bytes):
    """Each cut loaded and exported; in one process also the logits of TOKENS."""
    from unittest.mock import patch

    from megatron.core import parallel_state

    from grpo_mega.model.attention import PackedRows
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage

    logits = []
    for n, (name, tensor, pipeline, stages) in enumerate(cuts):
        parallel_state.destroy_model_parallel()
        mesh = initialize(tensor, pipeline)
        arch = read_architecture(folders[name])
        layout = ParallelConfig(tensor=tensor, pipeline=pipeline, pipeline_layout=stages)
        model = build_model(arch, mesh, layout)
        with patch.object(hugging_face, "SHARD_BYTES", shard_bytes):
            bridge.export(model, arch, mesh, layers_per_stage(arch, pipeline, stages), destination / str(n))
        if mesh.world.size == 1:
            positions = torch.arange(len(TOKENS))
            rows = PackedRows(*model.rope(positions), (len(TOKENS),))
            with torch.no_grad():
                hidden = model[0](torch.tensor([TOKENS]), positions[None], None, packed_seq_params=rows)
                logits.append(hidden[:, 0] @ model.output_weight()[: arch.vocab_size].t())
    return logits


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_export_of_what_was_loaded_is_bit_exact(ranks, folders, tmp_path, world):
    cuts = [cut for cut in CUTS if cut[1] * cut[2] == world]
    ranks(world, export_and_run, folders, cuts, tmp_path, hugging_face.SHARD_BYTES)
    for n, (name, *_) in enumerate(cuts):
        same_tensors(tmp_path / str(n), folders[name])
        assert sorted(p.name for p in (tmp_path / str(n)).iterdir()) == sorted(p.name for p in folders[name].iterdir())


def opened(path):
    return hugging_face.Folder(read_architecture(path))


def same_tensors(made, original):
    found, wanted = (opened(path) for path in (made, original))
    assert sorted(found.files) == sorted(wanted.files)
    for name in wanted.files:
        assert torch.equal(found.slice(name)[:], wanted.slice(name)[:]), name


def test_logits_are_those_of_transformers_before_and_after(ranks, folders, tmp_path):
    from transformers import AutoModelForCausalLM

    cuts = CUTS[:3]
    (logits,) = ranks(1, export_and_run, folders, cuts, tmp_path, hugging_face.SHARD_BYTES)
    for n, (name, *_) in enumerate(cuts):
        for path in (folders[name], tmp_path / str(n)):
            with torch.no_grad():
                wanted = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([TOKENS])).logits[0]
            torch.testing.assert_close(logits[n], wanted, rtol=1e-5, atol=1e-5)
        config, original = (
            json.loads((path / "config.json").read_text()) for path in (tmp_path / str(n), folders[name])
        )
        assert config == original | {"dtype": "float32"}


def test_large_models_are_written_and_read_in_several_files(ranks, folders, tmp_path):
    from transformers import AutoModelForCausalLM

    limit = 60_000  # the embedding has 49,728 bytes
    ranks(2, export_and_run, folders, [("untied", 2, 1, None)], tmp_path, limit)
    made = tmp_path / "0"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = sorted(made.glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert len(files) > 4 and max(sizes) <= limit and index["metadata"]["total_size"] == sum(sizes)
    same_tensors(made, folders["untied"])
    loaded = AutoModelForCausalLM.from_pretrained(made).state_dict()
    wanted = load_file(folders["untied"] / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    ranks(1, export_and_run, {"untied": made}, [("untied", 1, 1, None)], tmp_path / "again", hugging_face.SHARD_BYTES)
    same_tensors(tmp_path / "again" / "0", folders["untied"])  # and back into one file: no stale index goes along
    assert not (tmp_path / "again" / "0" / "model.safetensors.index.json").exists()


def test_progress_and_an_export_that_fails_hears_every_rank_out(ranks, folders, tmp_path):
    failing = tmp_path / "file"
    failing.write_text("")
    first, second = ranks(2, ticks_and_failures, folders["tied"], tmp_path, failing)
    for seen, _ in (first, second):
        done, totals = zip(*seen["load"], strict=True)
        assert sorted(done) == list(done) and set(totals) == {done[-1]} and len(done) > 10
    numbers = sum(tensor.numel() for tensor in load_file(folders["tied"] / "model.safetensors").values())
    assert first[0]["export"][-1] == (numbers, numbers) and second[0]["export"] == []
    at_once, half_way = first[1]
    assert at_once == f"{failing}/made cannot be written ([Errno 20] Not a directory: '{failing}/made.partial')"
    assert half_way.startswith(f"{tmp_path}/lost cannot be written (") and "No such file" in half_way
    assert second[1] == [None, None]  # it has sent all that it has, and waits for nobody
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "whole"]


def test_an_export_is_all_or_nothing(folders, tmp_path):
    """A tensor that lacks is an error, and no folder stands under the final name; none is written twice."""
    arch = read_architecture(folders["tied"])
    tensors = load_file(folders["tied"] / "model.safetensors")
    writer = hugging_face.Writer(arch, tmp_path / "made", dict.fromkeys(shapes(arch), torch.float32))
    for name, tensor in tensors.items():
        if name != UP:
            writer.put(name, tensor)
    with pytest.raises(AssertionError, match=r"1 tensors incomplete, the first is model\.layers\.3\.mlp\.up_proj"):
        writer.close()
    assert not (tmp_path / "made").exists()
    for wrong in (tensors[UP][:-1], tensors[UP].double()):
        with pytest.raises(AssertionError, match=UP):
            writer.put(UP, wrong)
    writer.put(UP, tensors[UP])
    with pytest.raises(AssertionError, match=UP):
        writer.put(UP, tensors[UP])
    writer.close()
    same_tensors(tmp_path / "made", folders["tied"])


@pytest.mark.filterwarnings("ignore")  # megatron-core, imported here without the stand-in
@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
@pytest.mark.parametrize("pipeline", [(5,), (2, 3), (1, 1, 3)])
@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("name", ["untied", "few"])
def test_every_element_has_exactly_one_home(folders, name, virtual, tensor, pipeline):
    """Matrices are cut without gap or overlap; norms lie whole on every tensor rank."""
    arch = read_architecture(folders[name])
    owners = {key: torch.zeros(shape, dtype=torch.int) for key, shape in shapes(arch).items()}
    if len(pipeline) % virtual:
        pytest.skip(f"{len(pipeline)} stages are no multiple of {virtual} virtual ones")
    length = len(pipeline) // virtual
    for stage in range(length):
        for rank in range(tensor):
            for _, parts in bridge.pieces(arch, bridge.Place(rank, tensor, stage, length, pipeline)):
                for piece in parts:
                    owners[piece.name].narrow(piece.dim, piece.source, piece.length).add_(1)
    for key, count in owners.items():
        copies = tensor if key.endswith("norm.weight") else 1
        copies += arch.tied_embeddings and key == "model.embed_tokens.weight" and len(pipeline) > 1
        assert count.unique().tolist() == [copies], key


def test_query_key_value_rows_by_hand(folders):
    """12 query and 2 key-value heads of 6 rows on 4 ranks: a group of 48 rows is cut after the fourth query head."""
    arch = read_architecture(folders["few"])
    name = "0.decoder.layers.0.self_attention.linear_qkv.weight"
    cut = [
        [(p.name.split(".")[-2][0], p.source, p.start, p.length) for p in dict(bridge.pieces(arch, place))[name]]
        for place in (bridge.Place(rank, 4, 0, 1, (5,)) for rank in range(4))
    ]
    assert cut == [
        [("q", 0, 0, 24)],
        [("q", 24, 0, 12), ("k", 0, 12, 6), ("v", 0, 18, 6)],
        [("q", 36, 0, 24)],
        [("q", 60, 0, 12), ("k", 6, 12, 6), ("v", 6, 18, 6)],
    ]


# ---- folders that are refused


def spoil(folder, change):
    """Write the folder's tensors again after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check(folder):
    opened(folder).check()


UP = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), rf"lacks 1 tensors, the first is {UP}"),
        (
            lambda t: t.update({"model.layers.5.mlp.up_proj.weight": t[UP].clone()}),
            r"1 tensors .* account for.*layers\.5",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), r"q_proj\.bias"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), rf"{UP} has shape \(95, 48\), config.json says \(96, 48\)"),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), rf"{UP} has shape \(48, 96\)"),
    ],
    ids=["missing", "unknown", "bias", "short", "transposed"],
)
def test_tensors_that_do_not_belong_to_the_configuration(folder, change, words):
    check(folder)
    spoil(folder, change)
    with pytest.raises(ConfigError, match=words):
        check(folder)


def test_what_old_folders_carry_is_ignored(folder):
    spoil(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    spoil(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # tied all the same
    check(folder)  # raises for what is not
    assert len(opened(folder).files) == len(shapes(read_architecture(folder))) + 2


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read: .*; fetch the file again"):
        check(folder)


def test_a_folder_without_weights_or_without_itself(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors; convert"):
        check(folder)
    with pytest.raises(ConfigError, match=r"nowhere does not exist; give a Hugging Face folder"):
        read_architecture(folder / "nowhere")


def test_an_index_that_is_wrong(folder):
    index = folder / "model.safetensors.index.json"
    weight_map = dict.fromkeys(opened(folder).files, "model.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {UP: "model-2.safetensors"}}))
    with pytest.raises(ConfigError, match=r"model-2\.safetensors cannot be read"):
        check(folder)
    spoil(folder, lambda t: t.pop(UP))
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=rf"model\.safetensors lacks {UP}, which the index says"):
        check(folder)
    for text in (json.dumps({"weight_map": weight_map})[:-20], "{}", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ConfigError, match="is not an index of safetensors"):
            check(folder)


# ---- config.json


def configure(folder, **changes):
    """config.json with changes; None removes a key."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'; supported: .*LlamaForCausalLM"),
        ({"architectures": None}, "architecture 'nothing'"),
        ({"attention_bias": True}, "attention_bias=true; supported: matrices without biases"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported: silu, gelu"),
        ({"num_key_value_heads": 5}, "12 attention heads are not a multiple of 5"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be positive"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"vocab_size": "many"}, "value of the wrong kind"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_configurations_that_are_refused(folder, changes, words):
    configure(folder, **changes)
    with pytest.raises(ConfigError, match=words):
        read_architecture(folder)


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[1]", "holds list, not an object")])
def test_a_configuration_that_is_no_object(folder, text, words):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_architecture(folder)


def test_layouts_that_cannot_cut_the_model(folders):
    few, tied = read_architecture(folders["few"]), read_architecture(folders["tied"])
    for tensor in (1, 2, 4, 12):
        check_layout(few, tensor, 5)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3 does not divide.* use tensor in \[1, 2, 4, 6, 12\]"):
        check_layout(few, 3, 1)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=5 .* use tensor in \[1, 2, 3, 6, 12\]"):
        check_layout(tied, 5, 1)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=6 exceeds the model's 5 layers"):
        check_layout(tied, 1, 6)


def test_rotary_frequencies(folder):
    """theta^(-2i/d): 1 and 1/100 for d = 4; linear scaling divides them, an unknown kind is refused."""
    assert rope_inverse_frequencies(read_architecture(folder))[0].tolist() == pytest.approx([1.0, 0.01])
    configure(folder, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    frequencies, factor = rope_inverse_frequencies(read_architecture(folder))
    assert frequencies.tolist() == pytest.approx([0.25, 0.0025]) and factor == 1.0
    configure(folder, rope_parameters=None, rope_theta=100.0)  # as older folders say it
    assert rope_inverse_frequencies(read_architecture(folder))[0].tolist() == pytest.approx([1.0, 0.1])
    configure(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match="rope_type='dynamic'; supported: default, linear, llama3, yarn"):
        rope_inverse_frequencies(read_architecture(folder))
