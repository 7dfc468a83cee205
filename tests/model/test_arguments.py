"""Megatron-LM's arguments and config.json: the same model in both, or a sentence about the one that is not."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest
import torch
from families import MODELS, make_family

from grpo_mega.errors import ConfigError
from grpo_mega.model.families import architecture_of, read_architecture
from grpo_mega.model.formats.arguments import arguments_of, config_from_arguments
from grpo_mega.model.rotary import rope_inverse_frequencies

LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SAID = {  # a Llama, as Megatron-LM's run writes it
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "kv_channels": 8,
    "group_query_attention": True, "num_query_groups": 2, "max_position_embeddings": 512, "vocab_size": 1000,
    "padded_vocab_size": 1024, "position_embedding_type": "rope", "rotary_base": 10000, "normalization": "RMSNorm",
    "norm_epsilon": 1e-5, "swiglu": True, "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
UNTOLD = ("qwen2-window", "gemma3", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3")  # their words are not complete
MIXTURE = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}


def same(found, wanted, *, but=()):
    for field in fields(wanted):
        if field.name not in ("folder", "family", "raw", "ropes", *but):
            assert getattr(found, field.name) == getattr(wanted, field.name), field.name
    a, b = rope_inverse_frequencies(found), rope_inverse_frequencies(wanted)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNTOLD])
def test_there_and_back(tmp_path, name):
    changes = {"rope_parameters": LLAMA31} if name == "llama3" else {}
    changes |= {"sliding_window": 9} if name in ("mistral", "mixtral") else {}  # without, a Mistral is a Llama
    arch = read_architecture(make_family(tmp_path / "model", name, **changes))
    args, unsaid = arguments_of(arch, torch.float32, {"padded_vocab_size": 384})
    assert not unsaid
    raw = config_from_arguments(args)
    assert raw["architectures"] == arch.raw["architectures"]
    same(architecture_of(raw, arch.folder), arch)


@pytest.mark.parametrize("name", UNTOLD)
def test_a_model_that_is_told_in_part_is_refused_or_named(tmp_path, name):
    args, unsaid = arguments_of(read_architecture(make_family(tmp_path / "model", name)), torch.float32, {})
    if name.startswith("deepseek"):
        assert args.multi_latent_attention and args.kv_lora_rank and args.moe_shared_expert_intermediate_size
        with pytest.raises(ConfigError, match=r"multi_latent_attention=True, for which config\.json has no word"):
            config_from_arguments(args)
    else:
        assert unsaid[-1].startswith("windows of [7] rows") or "post_norms=True" in unsaid


def test_what_the_arguments_do_not_say_is_named(tmp_path):
    arch = read_architecture(make_family(tmp_path / "model", "llama3"))  # its rotary constants are not megatron's
    args, unsaid = arguments_of(arch, torch.bfloat16, {})
    assert len(unsaid) == 1 and unsaid[0].startswith("rope_type=llama3 with ")
    assert not args.use_rope_scaling and args.bf16 and args.params_dtype == torch.bfloat16
    halves = read_architecture(make_family(tmp_path / "halves", "deepseek_v3", rope_interleave=False))
    assert "rotary pairs that lie half a head apart in latent attention" in arguments_of(halves, torch.float32, {})[1]
    arch = read_architecture(make_family(tmp_path / "other", "qwen2", rope_parameters={"rope_theta": 10000.5}))
    assert arguments_of(arch, torch.float32, {})[1] == ["rope_theta=10000.5"]


def test_a_checkpoint_of_megatrons_own():
    raw = config_from_arguments(argparse.Namespace(**SAID, attention_backend="flash", lr=1e-4))
    assert raw["architectures"] == ["LlamaForCausalLM"] and raw["num_key_value_heads"] == 2
    assert (raw["intermediate_size"], raw["head_dim"], raw["vocab_size"]) == (96, 8, 1000)
    assert not raw["tie_word_embeddings"]
    raw = config_from_arguments(argparse.Namespace(**SAID | MIXTURE | {"qk_layernorm": True, "moe_layer_freq": 2}))
    assert raw["architectures"] == ["Qwen3MoeForCausalLM"] and raw["mlp_only_layers"] == [1]
    assert raw["norm_topk_prob"] and raw["moe_intermediate_size"] == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "LayerNorm"}, r"normalization='LayerNorm'; .* have 'RMSNorm': put the model's config"),
        ({"swiglu": False}, r"swiglu=False"),
        ({"position_embedding_type": "yarn"}, r"position_embedding_type='yarn'"),
        ({"rotary_percent": 0.5}, r"rotary_percent=0\.5, for which config\.json has no word"),
        ({"add_bias_linear": True}, r"add_bias_linear=True"),
        ({"multi_latent_attention": True}, r"multi_latent_attention=True"),
        ({"mtp_num_layers": 1}, r"mtp_num_layers=1"),
        ({"vocab_size": None}, r"have no vocab_size, and padded_vocab_size=1024 counts rows that are no tokens"),
        ({"num_query_groups": None}, r"have no num_query_groups"),
        ({"window_size": (8, 8)}, r"window_size=\(8, 8\)"),
        ({"window_size": (8, 0), "qk_layernorm": True}, r"window_size=\(8, 0\)"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, r"qk_layernorm and add_qkv_bias"),
        (MIXTURE | {"add_qkv_bias": True}, r"num_experts and add_qkv_bias"),
        (MIXTURE | {"moe_router_pre_softmax": True}, r"moe_router_pre_softmax=True, which Mixtral has not"),
        (MIXTURE | {"moe_layer_freq": [1, 0]}, r"moe_layer_freq=\[1, 0\], which Mixtral has not"),
        (MIXTURE | {"moe_layer_freq": [1], "qk_layernorm": True}, r"moe_layer_freq=\[1\] of 1 layers and num_layers=2"),
        (MIXTURE | {"moe_router_score_function": "sigmoid"}, r"moe_router_score_function='sigmoid'"),
        (MIXTURE | {"moe_shared_expert_intermediate_size": 64}, r"moe_shared_expert_intermediate_size=64"),
        (MIXTURE | {"moe_router_load_balancing_type": "sinkhorn"}, r"moe_router_load_balancing_type='sinkhorn'"),
    ],
)
def test_what_config_json_cannot_say_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config_from_arguments(argparse.Namespace(**SAID | changes))
