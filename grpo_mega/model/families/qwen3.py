"""Qwen3 (arXiv:2505.09388), dense: Llama with a norm over each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families import llama
from grpo_mega.model.families.llama import FEED_FORWARD, INPUT_NORM, MLP_NORM, PROJ, QKV
from grpo_mega.model.families.qwen2 import windows
from grpo_mega.model.families.table import Family, Row, same

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

HEAD_NORMS = (
    same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "head"),
    same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "head"),
)
ATTENTION = (INPUT_NORM, QKV, *HEAD_NORMS, PROJ, MLP_NORM)
LAYER = (*ATTENTION, *FEED_FORWARD)


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    llama.read(raw)
    return {"qk_norm": True, **windows(raw)}


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return LAYER


FAMILY = Family("Qwen3", read, layer)
