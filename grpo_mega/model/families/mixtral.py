"""Mixtral (arXiv:2401.04088): Llama whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.families import mistral
from grpo_mega.model.families.llama import INPUT_NORM, MLP_NORM, PROJ, QKV
from grpo_mega.model.families.table import Family, Row, feed_forward, same

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

_EXPERT = "block_sparse_moe.experts.{expert}."
EXPERTS = feed_forward(
    "mlp.experts.local_experts.{expert}.", _EXPERT + "w1.weight", _EXPERT + "w3.weight", _EXPERT + "w2.weight",
    "expert_ffn",
)  # fmt: skip
LAYER = (
    INPUT_NORM,
    QKV,
    PROJ,
    MLP_NORM,
    same("mlp.router.weight", "block_sparse_moe.gate.weight", "experts", "hidden"),
    *EXPERTS,
)


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(raw["num_local_experts"]),
        "experts_per_token": int(raw["num_experts_per_tok"]),
        "expert_ffn_size": int(raw["intermediate_size"]),
        **mistral.read({"sliding_window": None, **raw}),
    }


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    return LAYER


FAMILY = Family("Mixtral", read, layer)
