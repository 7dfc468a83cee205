"""A model in Megatron-LM's arguments: what a checkpoint of its own says in `args`, to and from config.json's words.

Either direction says a model exactly or not at all. A setting that the other side has no word for is named: by
`config_from_arguments` in a ConfigError, by `arguments_of` in a list, for there config.json lies beside the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture

# rotary_pos_embedding.py: megatron-core's scaling of Llama 3 has a factor to choose, and these constants
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What all families that can be told have: argument -> (what a checkpoint without it means, what it must say)
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "swiglu": (False, True),
    "position_embedding_type": ("learned_absolute", "rope"),
}
_ABSENT: dict[str, tuple[Any, ...]] = {  # what none of them has: argument -> the values that mean "nothing of the kind"
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "add_bias_linear": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "window_attn_skip_freq": (None,),
    "mtp_num_layers": (None, 0),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_latent_size": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None, 1),
    "moe_expert_capacity_factor": (None,),
}
_REMEDY = "put the model's config.json beside the checkpoint"


def config_from_arguments(args: Any) -> dict[str, Any]:
    """Hugging Face's config.json of the model that Megatron-LM's arguments (a namespace) describe.

    Which family it is, the arguments show: experts with norms over query and key heads are Qwen3's, without Mixtral's;
    dense, those norms are Qwen3's, biases on query, key and value Qwen2's, a window Mistral's, none of them Llama's.
    Raises ConfigError, naming the argument, for a model that is none of these or that they say in part.
    """
    said = dict(vars(args))
    _check(said)
    heads, hidden = _need(said, "num_attention_heads"), _need(said, "hidden_size")
    if said.get("vocab_size") is None:
        raise ConfigError(
            f"the checkpoint's arguments have no vocab_size, and padded_vocab_size={said.get('padded_vocab_size')} "
            f"counts rows that are no tokens; {_REMEDY}"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.get("rotary_base", 10000))}
    if said.get("use_rope_scaling"):
        rope |= {"rope_type": "llama3", "factor": float(said.get("rope_scaling_factor", 8.0)), **LLAMA3}
    config = {
        "vocab_size": said["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": _need(said, "ffn_hidden_size"),
        "num_hidden_layers": _need(said, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _need(said, "num_query_groups") if said.get("group_query_attention") else heads,
        "head_dim": said.get("kv_channels") or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": _need(said, "max_position_embeddings"),
        "rms_norm_eps": said.get("norm_epsilon", 1e-5),
        "rope_parameters": rope,
        "tie_word_embeddings": not said.get("untie_embeddings_and_output_weights", False),
    }
    return config | (_mixture(said) if said.get("num_experts") else _dense(said))


def _need(said: Mapping[str, Any], name: str) -> Any:
    if said.get(name) is None:
        raise ConfigError(f"the checkpoint's arguments have no {name}; {_REMEDY}")
    return said[name]


def _check(said: Mapping[str, Any]) -> None:
    for name, (default, wanted) in _MUST_BE.items():
        if (found := said.get(name, default)) != wanted:
            raise ConfigError(
                f"the checkpoint's arguments say {name}={found!r}; the models that can be told from them have "
                f"{wanted!r}: {_REMEDY}"
            )
    for name, allowed in _ABSENT.items():
        if (found := said.get(name, allowed[0])) not in allowed:
            raise ConfigError(
                f"the checkpoint's arguments say {name}={found!r}, for which config.json has no word in the families "
                f"that can be told from them; {_REMEDY}"
            )

    balancing = said.get("moe_router_load_balancing_type")
    if "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        raise ConfigError(
            f"the checkpoint's arguments say moe_router_load_balancing_type={balancing!r}, which chooses other experts "
            f"than any of the families; {_REMEDY}"
        )


def _named(kind: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": model_type}


def _window(said: Mapping[str, Any], *, allowed: bool) -> dict[str, Any]:
    """Megatron counts the rows before a row's own, config.json that row too."""
    window = said.get("window_size")
    if window is None:
        return {"sliding_window": None} if allowed else {}
    if not allowed or not isinstance(window, (tuple, list)) or len(window) != 2 or window[1] != 0 or window[0] < 0:
        raise ConfigError(f"the checkpoint's arguments say window_size={window!r}, of no family's kind; {_REMEDY}")
    return {"sliding_window": int(window[0]) + 1}


def _dense(said: Mapping[str, Any]) -> dict[str, Any]:
    norms, biases = bool(said.get("qk_layernorm")), bool(said.get("add_qkv_bias"))
    if norms and biases:
        raise ConfigError(
            f"the checkpoint's arguments say qk_layernorm and add_qkv_bias, which no family has; {_REMEDY}"
        )
    if said.get("window_size") is not None and not (norms or biases):
        return _named("Mistral", "mistral") | _window(said, allowed=True)
    _window(said, allowed=False)
    if norms:
        return _named("Qwen3", "qwen3") | {"attention_bias": False}
    return _named("Qwen2", "qwen2") if biases else _named("Llama", "llama") | {"attention_bias": False}


def _mixture(said: Mapping[str, Any]) -> dict[str, Any]:
    """Softmax over the chosen experts' scores alone, or over all and not divided again (moe_router_pre_softmax)."""
    if said.get("add_qkv_bias"):
        raise ConfigError(
            f"the checkpoint's arguments say num_experts and add_qkv_bias, which no family has; {_REMEDY}"
        )
    count, layers = said["num_experts"], said["num_layers"]
    top, renormalised = said.get("moe_router_topk", 2), not said.get("moe_router_pre_softmax", False)
    size = said.get("moe_ffn_hidden_size") or said["ffn_hidden_size"]
    frequency = said.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        mixtures = [number % frequency == 0 for number in range(layers)]
    else:
        mixtures = [bool(each) for each in frequency]
        if len(mixtures) != layers:
            raise ConfigError(
                f"the checkpoint's arguments say moe_layer_freq={frequency} of {len(mixtures)} layers and "
                f"num_layers={layers}; {_REMEDY}"
            )
    if said.get("qk_layernorm"):
        _window(said, allowed=False)
        return _named("Qwen3Moe", "qwen3_moe") | {
            "attention_bias": False,
            "num_experts": count,
            "num_experts_per_tok": top,
            "moe_intermediate_size": size,
            "norm_topk_prob": renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [number for number, mixed in enumerate(mixtures) if not mixed],
        }
    if not all(mixtures) or not renormalised:
        found = f"moe_router_pre_softmax={not renormalised}" if all(mixtures) else f"moe_layer_freq={frequency}"
        raise ConfigError(f"the checkpoint's arguments say {found}, which Mixtral has not; {_REMEDY}")
    return _named("Mixtral", "mixtral") | {
        "num_local_experts": count,
        "num_experts_per_tok": top,
        "intermediate_size": size,
        **_window(said, allowed=True),
    }


def arguments_of(
    arch: Architecture, dtype: torch.dtype, layout: Mapping[str, Any]
) -> tuple[argparse.Namespace, list[str]]:
    """(Megatron-LM's arguments for the model, what of it they do not say, in words). layout: arguments that say how it
    is cut, the padded vocabulary among them."""
    unsaid: list[str] = []
    said: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": arch.num_kv_heads != arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.context_length,
        "vocab_size": arch.vocab_size,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": arch.activation == "silu",
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "num_experts": arch.num_experts or None,
        **_rope_arguments(arch, unsaid),
        **_window_arguments(arch, unsaid),
        **_mixture_arguments(arch, unsaid),
        **layout,
    }
    if arch.latent is not None:
        if not arch.latent.interleaved:  # multi_latent_attention.py takes pairs of neighbours, always
            unsaid.append("rotary pairs that lie half a head apart in latent attention")
        said |= {
            "multi_latent_attention": True,
            "rope_type": "rope",  # there the default is YaRN's
            "q_lora_rank": arch.latent.q_rank,
            "kv_lora_rank": arch.latent.kv_rank,
            "qk_head_dim": arch.latent.plain,
            "qk_pos_emb_head_dim": arch.latent.rotary,
            "v_head_dim": arch.latent.value,
        }
    odd = {
        "query_scale": arch.query_scale != 1.0,
        "activation": arch.activation != "silu",
        "norm_offset": arch.norm_offset != 0.0,
        "post_norms": arch.post_norms,
        "embedding_scale": arch.embedding_scale != 1.0,
    }
    unsaid += [f"{name}={getattr(arch, name)}" for name, present in odd.items() if present]
    return argparse.Namespace(**said), unsaid


def _rope_arguments(arch: Architecture, unsaid: list[str]) -> dict[str, Any]:
    if not arch.ropes or len(arch.ropes) > 1:
        unsaid.append(f"{len(arch.ropes)} kinds of rotary positions")
        return {}
    rope = dict(arch.ropes[0])
    theta = float(rope.pop("rope_theta", arch.raw.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    said: dict[str, Any] = {
        "rotary_base": int(theta),
        "use_rope_scaling": False,
    }  # Megatron-LM's base is a whole number
    if theta != int(theta):
        unsaid.append(f"rope_theta={theta}")
    if kind == "llama3" and all(rope.get(name) == value for name, value in LLAMA3.items()):
        said |= {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    elif kind != "default":
        unsaid.append(f"rope_type={kind} with {rope}")
    return said


def _window_arguments(arch: Architecture, unsaid: list[str]) -> dict[str, Any]:
    windows = set(arch.windows)
    if windows <= {None}:
        return {"window_size": None}
    if len(windows) > 1:
        unsaid.append(f"windows of {sorted(window for window in windows if window)} rows in some of the layers")
        return {"window_size": None}
    return {"window_size": (int(arch.windows[0] or 0) - 1, 0)}


def _mixture_arguments(arch: Architecture, unsaid: list[str]) -> dict[str, Any]:
    if not arch.num_experts:
        return {}
    router, top = arch.router, arch.experts_per_token
    mixtures = [int(arch.is_mixture(number)) for number in range(arch.num_layers)]
    # moe_utils.py: a group's score is the sum of its topk / group_topk highest; sigmoids are always divided by their
    # sum; where softmax is over the chosen alone, groups are chosen by what it is taken of
    scores = {"max": 1, "two": 2}[router.group_score]
    if router.groups > 1 and (top // router.top_groups != scores or (router.score == "softmax" and router.normalised)):
        unsaid.append(f"how groups of experts are chosen (group_score={router.group_score})")
    if router.score == "sigmoid" and not router.normalised:
        unsaid.append("sigmoid scores that are not divided by their sum")
    return {
        "moe_router_topk": top,
        "moe_ffn_hidden_size": arch.expert_ffn_size,
        "moe_layer_freq": 1 if all(mixtures) else mixtures,
        "moe_shared_expert_intermediate_size": arch.shared_ffn_size or None,
        "moe_router_score_function": router.score,
        "moe_router_pre_softmax": router.score == "softmax" and not router.normalised,
        "moe_router_enable_expert_bias": router.biased,
        "moe_router_topk_scaling_factor": None if router.scale == 1.0 else router.scale,
        "moe_router_num_groups": router.groups if router.groups > 1 else None,
        "moe_router_group_topk": router.top_groups if router.groups > 1 else None,
    }
