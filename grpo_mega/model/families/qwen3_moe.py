"""Qwen3's mixtures of experts (arXiv:2505.09388), of which some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families import qwen2, qwen3
from grpo_mega.model.families.qwen3 import ATTENTION
from grpo_mega.model.families.table import Family, Row, feed_forward, projections, same
from grpo_mega.model.routing import Router

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

EXPERTS = feed_forward("mlp.experts.local_experts.{expert}.", *projections("mlp.experts.{expert}."), "expert_ffn")
ROUTER = same("mlp.router.weight", "mlp.gate.weight", "experts", "hidden")


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    count, step = int(raw["num_hidden_layers"]), int(raw.get("decoder_sparse_step", 1))
    dense = raw.get("mlp_only_layers") or ()
    windows = qwen2.windows({**raw, "layer_types": ["sliding_attention"] * count})  # in every layer, or in none
    mixtures = tuple(n not in dense and (n + 1) % step == 0 for n in range(count))
    return {
        "num_experts": int(raw.get("num_experts") or raw["num_local_experts"]),
        "experts_per_token": int(raw["num_experts_per_tok"]),
        "expert_ffn_size": int(raw["moe_intermediate_size"]),
        "mixtures": mixtures,
        "router": Router(normalised=bool(raw.get("norm_topk_prob", False))),
        **qwen3.read(raw),
        **windows,
    }


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return (*ATTENTION, ROUTER, *EXPERTS) if arch.is_mixture(number) else qwen3.LAYER


FAMILY = Family("Qwen3-MoE", read, layer)
