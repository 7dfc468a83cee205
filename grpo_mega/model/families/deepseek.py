"""DeepSeek-V2 and V3 (arXiv:2405.04434, arXiv:2412.19437), R1 among them: latent attention, mixtures of many small
experts beside shared ones, and first layers that are dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_mega.model.architecture import Latent
from grpo_mega.model.families import llama
from grpo_mega.model.families.llama import FEED_FORWARD, INPUT_NORM, MLP_NORM, PROJ
from grpo_mega.model.families.qwen3_moe import EXPERTS, ROUTER
from grpo_mega.model.families.table import Family, Row, feed_forward, projections, rows, same
from grpo_mega.model.routing import Router

if TYPE_CHECKING:
    from grpo_mega.model.architecture import Architecture

_MINE, _THEIRS = "self_attention.", "self_attn."
QUERY = (rows(_MINE + "linear_q_proj.weight", _THEIRS + "q_proj.weight", "query", "hidden"),)
NARROW_QUERY = (
    same(_MINE + "linear_q_down_proj.weight", _THEIRS + "q_a_proj.weight", "q_rank", "hidden"),
    same(_MINE + "q_layernorm.weight", _THEIRS + "q_a_layernorm.weight", "q_rank"),
    rows(_MINE + "linear_q_up_proj.weight", _THEIRS + "q_b_proj.weight", "query", "q_rank"),
)
KEY_VALUE = (
    same(_MINE + "linear_kv_down_proj.weight", _THEIRS + "kv_a_proj_with_mqa.weight", "kv_down", "hidden"),
    same(_MINE + "kv_layernorm.weight", _THEIRS + "kv_a_layernorm.weight", "kv_rank"),
    rows(_MINE + "linear_kv_up_proj.weight", _THEIRS + "kv_b_proj.weight", "kv_up", "kv_rank"),
)
BIAS = same("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "experts", float32=True)
SHARED_EXPERTS = feed_forward("mlp.shared_experts.", *projections("mlp.shared_experts."), "shared_ffn")
PREDICTION = "the layers that predict further tokens are a part of pretraining; GRPO trains the model without them"


def read_v2(raw: Mapping[str, Any]) -> dict[str, Any]:
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method={method!r}; supported: greedy, group_limited_greedy")
    if raw.get("norm_topk_prob"):  # its publisher then leaves the scale out, transformers the normalisation
        raise ValueError("norm_topk_prob=true; supported: false, as in the published models")
    _only(raw, "scoring_func", "softmax")
    limited = method == "group_limited_greedy"
    router = Router(
        normalised=False,
        scale=float(raw.get("routed_scaling_factor", 1.0)),
        groups=int(raw["n_group"]) if limited else 1,
        top_groups=int(raw["topk_group"]) if limited else 1,
    )
    return _read(raw, router, interleaved=True)


def read_v3(raw: Mapping[str, Any]) -> dict[str, Any]:
    _only(raw, "topk_method", "noaux_tc")
    _only(raw, "scoring_func", "sigmoid")
    router = Router(
        score="sigmoid",
        normalised=bool(raw.get("norm_topk_prob", True)),
        scale=float(raw.get("routed_scaling_factor", 1.0)),
        biased=True,
        groups=int(raw["n_group"]),
        top_groups=int(raw["topk_group"]),
        group_score="two",
    )
    return _read(raw, router, interleaved=bool(raw.get("rope_interleave", True)))


def _read(raw: Mapping[str, Any], router: Router, *, interleaved: bool) -> dict[str, Any]:
    llama.read(raw)
    heads, plain, rotary = (int(raw[k]) for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    q_rank = raw["q_lora_rank"]
    latent = Latent(
        q_rank=None if q_rank is None else int(q_rank),
        kv_rank=int(raw["kv_lora_rank"]),
        plain=plain,
        rotary=rotary,
        value=int(raw["v_head_dim"]),
        interleaved=interleaved,
    )
    if latent.value > plain + rotary:
        raise ValueError(f"v_head_dim={latent.value}; supported: at most the {plain + rotary} dimensions of a key")
    count, chosen = int(raw["n_routed_experts"]), int(raw["num_experts_per_tok"])
    _check_groups(router, count, chosen)
    layers, first = range(int(raw["num_hidden_layers"])), int(raw.get("first_k_dense_replace", 0))
    step = int(raw.get("moe_layer_freq", 1))
    expert_ffn = int(raw["moe_intermediate_size"])
    return {
        "num_kv_heads": heads,
        "head_dim": plain + rotary,
        "latent": latent,
        "query_scale": _query_scale(raw.get("rope_parameters") or raw.get("rope_scaling") or {}),
        "num_experts": count,
        "experts_per_token": chosen,
        "expert_ffn_size": expert_ffn,
        "shared_ffn_size": expert_ffn * int(raw.get("n_shared_experts") or 0),
        "mixtures": tuple(n >= first and n % step == 0 for n in layers),
        "router": router,
    }


def _only(raw: Mapping[str, Any], key: str, value: str) -> None:
    if raw.get(key, value) != value:
        raise ValueError(f"{key}={raw[key]!r}; supported: {value}")


def _check_groups(router: Router, experts: int, chosen: int) -> None:
    groups, top = router.groups, router.top_groups
    size = experts // groups if groups > 0 and experts % groups == 0 else 0
    if size < (2 if router.group_score == "two" else 1) or not 0 < top <= groups or chosen > top * size:
        raise ValueError(
            f"n_group={groups}, topk_group={top} with n_routed_experts={experts}, num_experts_per_tok={chosen}; "
            "supported: groups of equally many experts (two or more where biases choose), which leave enough of them"
        )


def _query_scale(rope: Mapping[str, Any]) -> float:
    """(0.1 mscale_all_dim ln(factor) + 1)^2: what stretched positions want logits to be multiplied with (YaRN,
    arXiv:2309.00071, section 3.4, its square root on queries and keys alike)."""
    kind, share = rope.get("rope_type", rope.get("type", "default")), float(rope.get("mscale_all_dim") or 0)
    if kind == "default" or not share or float(rope["factor"]) <= 1:
        return 1.0
    return (0.1 * share * math.log(float(rope["factor"])) + 1) ** 2


def layer(arch: Architecture, number: int) -> tuple[Row, ...]:
    assert arch.latent is not None
    query = QUERY if arch.latent.q_rank is None else NARROW_QUERY
    attention = (INPUT_NORM, *query, *KEY_VALUE, PROJ, MLP_NORM)
    if not arch.is_mixture(number):
        return (*attention, *FEED_FORWARD)
    bias = (BIAS,) if arch.router.biased else ()
    return (*attention, ROUTER, *bias, *EXPERTS, *(SHARED_EXPERTS if arch.shared_ffn_size else ()))


def drops(arch: Architecture) -> Mapping[str, str]:
    more = int(arch.raw.get("num_nextn_predict_layers") or 0)
    numbers = "|".join(str(arch.num_layers + n) for n in range(more))
    return {rf"model\.layers\.({numbers})\..*": PREDICTION} if more else {}


V2 = Family("DeepSeek-V2", read_v2, layer)
V3 = Family("DeepSeek-V3", read_v3, layer, drops, changes={"num_nextn_predict_layers": 0})
