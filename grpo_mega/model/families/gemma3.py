"""Gemma 3's text models (arXiv:2503.19786): most layers see a window, what is added is normed first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families.llama import FEED_FORWARD, INPUT_NORM, PROJ, QKV
from grpo_mega.model.families.qwen3 import HEAD_NORMS
from grpo_mega.model.families.table import Family, Row, same

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

LAYER = (
    INPUT_NORM,
    QKV,
    *HEAD_NORMS,
    PROJ,
    same("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    same("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight", "hidden"),
    *FEED_FORWARD,
    same("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", "hidden"),
)
DEFAULTS = {  # transformers' Gemma3TextConfig: published files leave out what agrees with it
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip
REFUSED = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # layers that see a window, and the others


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    for name in REFUSED:
        if raw.get(name):
            raise ValueError(f"{name}={raw[name]!r}; supported: models without it")
    count, pattern = int(raw["num_hidden_layers"]), int(raw["sliding_window_pattern"])
    kinds = raw.get("layer_types") or [LOCAL if (n + 1) % pattern else GLOBAL for n in range(count)]
    if len(kinds) != count or not set(kinds) <= {LOCAL, GLOBAL}:
        raise ValueError(f"layer_types={kinds!r}; supported: one of {LOCAL}, {GLOBAL} for each of {count} layers")
    window = raw["sliding_window"]
    return {
        "windows": tuple(window if kind == LOCAL else None for kind in kinds),
        "ropes": _ropes(raw),
        "rope_of_layer": tuple(int(kind == LOCAL) for kind in kinds),
        "qk_norm": True,
        "query_scale": (raw["head_dim"] / raw["query_pre_attn_scalar"]) ** 0.5,
        "norm_offset": 1,
        "post_norms": True,
        "embedding_scale": raw["hidden_size"] ** 0.5,
    }


def _ropes(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary positions of layers that see everything, and of those that see a window; rope_scaling is the former's."""
    given = raw.get("rope_parameters") or {}
    if not set(given) <= {LOCAL, GLOBAL}:
        raise ValueError(f"rope_parameters of {', '.join(given)}; supported: one set each for {GLOBAL}, {LOCAL}")
    everything, near = (given.get(kind) or {} for kind in (GLOBAL, LOCAL))
    scaling = raw.get("rope_scaling") or {}
    return (
        {"rope_theta": raw.get("rope_theta", 1e6), **everything, **scaling},
        {"rope_theta": raw.get("rope_local_base_freq", 1e4), **near},
    )


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return LAYER


def _text(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **raw["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
    }


def _drops(arch: Architecture) -> dict[str, str]:
    return {r"(model\.)?(vision_tower|multi_modal_projector)\..*": "only the language model is trained"}


FAMILY = Family("Gemma 3", read, layer, defaults=DEFAULTS)
BESIDE_IMAGES = replace(
    FAMILY,
    drops=_drops,
    text=_text,
    prefixes={  # as published, and as newer folders have it
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
    },
)
