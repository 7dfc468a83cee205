"""Gemma 3's text models: config.json as transformers reads it, its rounding, and its gradients however it is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import logits_of, make_family
from safetensors.torch import load_file, save_file
from sharded import TEMPERATURE, gradients_of, hugging_face, load_in_float64, objective, samples, token_loss, whole

from grpo_mega.config import OptimizerConfig, ParallelConfig
from grpo_mega.data.packing import pack
from grpo_mega.errors import ConfigError
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.parallel.mesh import initialize, temporary_groups

ROWS = 32  # of a microbatch; two of them: 1 / 64 is exact in megatron's float32 scale
LAYOUTS = {
    1: [{}],
    2: [{"tensor": 2, "sequence": True}, {"tensor": 2}, {"pipeline": 2}, {"context": 2, "recompute": "selective"}],
}
NAME = {"architectures": ["Gemma3ForCausalLM"]}
CONFIGS = {
    "silent": {},
    "first": {  # as files were before transformers had rope_parameters
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 20000, "rope_scaling": None,
        "rope_theta": 500000, "sliding_window": 512, "sliding_window_pattern": 4, "vocab_size": 262144,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False,
    },
    "scaled": {
        "hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
        "query_pre_attn_scalar": 168, "num_hidden_layers": 62, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "new": {
        "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30000.0},
        },
    },
}  # fmt: skip


# ---- on the ranks


def answers(folder, layouts):
    return [answer(folder, layout) for layout in layouts]


@temporary_groups()
def answer(folder, layout):
    """This rank's log-probs (last stage) and gradients of two microbatches, one a group that shares its prompt."""
    from megatron.core import parallel_state

    from grpo_mega.model.bridge import Place
    from grpo_mega.model.build import build_model
    from grpo_mega.model.layout import layers_per_stage
    from grpo_mega.trainer.heads import TokenHead
    from grpo_mega.trainer.policy import Policy

    parallel_state.destroy_model_parallel()  # of the layout before
    parallel = ParallelConfig(**{key: value for key, value in layout.items() if key != "recompute"})
    mesh = initialize(**parallel.sizes)
    arch = read_architecture(folder)
    recompute = layout.get("recompute", "none")
    model = build_model(arch, mesh, parallel, dtype=torch.float64, recompute=recompute)
    policy = Policy(TokenHead(model, arch.vocab_size, mesh, TEMPERATURE), OptimizerConfig(), num_steps=1)
    s = samples()
    batches = [
        pack(bundles, ROWS, scale=2 * ROWS, dtype=torch.float64, device=mesh.device)
        for bundles in ([s[:2]], [s[2:3], s[3:]])
    ]
    logprobs = policy.logprobs(batches)
    policy.gradients(batches, objective)
    place = Place.of(mesh, layers_per_stage(arch, parallel.stages))
    trained = [lp[b.loss_weights != 0] for lp, b in zip(logprobs, batches, strict=True) if lp is not None]
    return {"logprobs": trained, "gradients": hugging_face(model, arch, place)}


def in_bf16(folder):
    """(embedding of every token, norm of a few rows) by the model's own modules in bf16."""
    from grpo_mega.model.build import build_model

    mesh = initialize(**ParallelConfig().sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, ParallelConfig(), dtype=torch.bfloat16, trainable=False)[0]
    tokens = torch.arange(arch.vocab_size)[None]
    embedded = model.embedding(tokens, tokens)[:, 0]
    return embedded, model.decoder.final_layernorm(embedded)


def kept_in_checkpoints(folder):
    """{name of a norm behind a linear: (shape, replica)} of what a checkpoint of two tensor ranks is told."""
    from grpo_mega.model.build import build_model

    parallel = ParallelConfig(tensor=2, sequence=True)
    mesh = initialize(**parallel.sizes)
    part = build_model(read_architecture(folder), mesh, parallel, trainable=False)[0]
    metadata = {"dp_cp_group": mesh.groups.dp_cp}
    return {
        name: (tensor.global_shape, tensor.replica_id)
        for name, tensor in part.sharded_state_dict(metadata=metadata).items()
        if name.endswith("post_layernorm.weight")
    }


# ---- in the parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Windows that are shorter than a shared prompt, and than sequences."""
    return make_family(tmp_path_factory.mktemp("models") / "gemma3", "gemma3", sliding_window=4)


@pytest.fixture(scope="module")
def reference(folder):
    """(log-probs of each microbatch, {name: gradient}) by transformers in float64, one sequence at a time."""
    model = load_in_float64(folder)
    logprobs, loss = [], torch.zeros((), dtype=torch.float64)
    for sample in samples():
        tokens, prompt = torch.tensor(sample.token_ids), sample.prompt_tokens
        logp = torch.log_softmax(model(tokens[None, :-1]).logits[0, prompt - 1 :] / TEMPERATURE, dim=1)
        logprobs.append(logp.gather(1, tokens[prompt:, None])[:, 0])
        coefficients = torch.tensor(sample.sampler_logprobs[prompt:], dtype=torch.float64)
        entropies = -(logp.exp() * logp).sum(dim=1)
        loss = loss + token_loss(logprobs[-1], entropies, sample.weight, sample.advantage, coefficients)
    loss.backward()
    return [torch.cat(logprobs[i : i + 2]).detach() for i in (0, 2)], gradients_of(model)


@pytest.mark.parametrize("world", [1, 2])
def test_no_layout_changes_a_logprob_or_a_gradient(ranks, folder, reference, world):
    by_rank = ranks(world, answers, folder, LAYOUTS[world], timeout=150)
    logprobs, gradients = reference
    for n, layout in enumerate(LAYOUTS[world]):
        results = [rank[n] for rank in by_rank]
        for result in results:
            for found, wanted in zip(result["logprobs"], logprobs, strict=False):
                assert (found - wanted).abs().max() <= 1e-10, layout
        assert any(len(result["logprobs"]) == 2 for result in results)
        for name, found in whole(results, gradients).items():
            wanted = gradients[name]
            assert wanted.abs().max() > 1e-3, f"{name}: nothing to compare"
            assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max(), (layout, name)


def test_bf16_rounds_where_transformers_does(ranks, folder):
    from transformers import Gemma3ForCausalLM

    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model
    ((embedded, normed),) = ranks(1, in_bf16, folder)
    with torch.no_grad():
        wanted = model.embed_tokens(torch.arange(len(embedded)))
        assert torch.equal(embedded, wanted)
        # float32 sums may differ in their last bit, which moves a rounding now and then
        assert (normed != model.norm(wanted)).double().mean() < 1e-3


def test_a_checkpoint_has_norms_behind_linears_once(ranks, folder):
    first, second = ranks(2, kept_in_checkpoints, folder)
    assert len(first) == 2 * 6 and first.keys() == second.keys()
    for name in first:
        assert first[name][0] == second[name][0] == (6, 48)  # megatron stacks the layers
        assert first[name][1] != second[name][1], f"{name}: both ranks would write it"


# ---- folders with more than the language model


def beside_images(folder, destination, begin):
    """A folder of transformers' with a vision tower, its language model that of `folder`; begin: how names begin."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=config, vision_config=vision, mm_tokens_per_image=4)
    )
    model.save_pretrained(destination)
    rest = {k: v for k, v in load_file(destination / "model.safetensors").items() if "language_model" not in k}
    text = {name.replace("model.", begin, 1): v for name, v in load_file(folder / "model.safetensors").items()}
    save_file(rest | text, destination / "model.safetensors", {"format": "pt"})
    return destination


def through(folder, destination):
    """The folder as it comes out again."""
    from grpo_mega.model import bridge
    from grpo_mega.model.build import build_model

    mesh = initialize(**ParallelConfig().sizes)
    arch = read_architecture(folder)
    model = build_model(arch, mesh, ParallelConfig(), trainable=False)
    bridge.export(model, arch, mesh, (arch.num_layers,), destination)


@pytest.mark.parametrize("begin", ["language_model.model.", "model.language_model."])
def test_the_language_model_is_taken_out_of_a_folder_with_images(ranks, folder, tmp_path, begin):
    ranks(1, through, beside_images(folder, tmp_path / "images", begin), tmp_path / "text")
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "text", folder))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits_of(tmp_path / "text"), logits_of(folder))


# ---- config.json


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_read_as_transformers_reads_it(name):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    from grpo_mega.model.rotary import rope_inverse_frequencies

    arch = architecture_of(NAME | CONFIGS[name], Path("folder"))
    config = Gemma3TextConfig(**CONFIGS[name])
    same = {
        "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_size": "intermediate_size",
        "vocab_size": "vocab_size", "tied_embeddings": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
        "context_length": "max_position_embeddings",
    }  # fmt: skip
    for mine, theirs in same.items():
        assert getattr(arch, mine) == getattr(config, theirs), mine
    assert arch.activation == "gelu_tanh" and config.hidden_activation == "gelu_pytorch_tanh"
    local = [kind == "sliding_attention" for kind in config.layer_types]
    assert arch.windows == tuple(config.sliding_window if near else None for near in local) and len(set(local)) == 2
    assert arch.query_scale / math.sqrt(arch.head_dim) == pytest.approx(config.query_pre_attn_scalar**-0.5, rel=1e-15)
    rotary = Gemma3RotaryEmbedding(config)
    for layer, kind in enumerate(config.layer_types):
        frequencies, factor = rope_inverse_frequencies(arch, arch.rope_of_layer[layer])
        assert torch.equal(frequencies, getattr(rotary, f"{kind}_inv_freq"))
        assert factor == getattr(rotary, f"{kind}_attention_scaling")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0; supported: models without it"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0; supported: models without it"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True; supported: models without it"),
        ({"attention_bias": True}, "attention_bias=True; supported: models without it"),
        (
            {"layer_types": ["full_attention"] * 25},
            "supported: one of sliding_attention, full_attention for each of 26",
        ),
        ({"layer_types": ["chunked_attention"] * 26}, "supported: one of sliding_attention"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters of rope_type; supported: one set each"),
        ({"sliding_window": 0}, "sliding_window=0 must be a positive number of rows"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ConfigError, match=r"^folder/config\.json") as error:
        architecture_of(NAME | change, Path("folder"))
    assert message in str(error.value)
