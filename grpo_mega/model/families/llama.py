"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), SmolLM2 among them: the decoder that the others vary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families.table import Family, Row, columns, feed_forward, groups, projections, same

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

INPUT_NORM = same("input_layernorm.weight", "input_layernorm.weight", "hidden")
QKV = groups("self_attention.linear_qkv.weight", "self_attn.{}_proj.weight", "hidden")
PROJ = columns("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "context")
MLP_NORM = same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden")
FEED_FORWARD = feed_forward("mlp.", *projections("mlp."), "ffn")
LAYER = (INPUT_NORM, QKV, PROJ, MLP_NORM, *FEED_FORWARD)


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise ValueError(f"{name}=true; supported: matrices without biases")
    return {}


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return LAYER


FAMILY = Family("Llama", read, layer)
