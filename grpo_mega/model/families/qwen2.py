"""Qwen2 and Qwen2.5 (arXiv:2412.15115): Llama with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families.llama import FEED_FORWARD, INPUT_NORM, MLP_NORM, PROJ, QKV
from grpo_mega.model.families.table import Family, Row, groups

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

QKV_BIAS = groups("self_attention.linear_qkv.bias", "self_attn.{}_proj.bias")
LAYER = (INPUT_NORM, QKV, QKV_BIAS, PROJ, MLP_NORM, *FEED_FORWARD)


def windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Layers from max_window_layers on, or those that layer_types names, see a window if use_sliding_window."""
    if not raw.get("use_sliding_window") or not raw.get("sliding_window", 4096):
        return {}
    count, first = int(raw["num_hidden_layers"]), int(raw.get("max_window_layers", 28))
    kinds = raw.get("layer_types") or [f"{'full' if n < first else 'sliding'}_attention" for n in range(count)]
    window = int(raw.get("sliding_window", 4096))
    return {"windows": tuple(window if kind == "sliding_attention" else None for kind in kinds)}


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, **windows(raw)}


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return LAYER


FAMILY = Family("Qwen2", read, layer)
