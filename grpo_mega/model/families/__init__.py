"""The families of models, by the architecture that config.json names, and the reading of that file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture
from grpo_mega.model.families import deepseek, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from grpo_mega.model.families.table import Family

FAMILIES = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3_moe.FAMILY,
    "Gemma3ForCausalLM": gemma3.FAMILY,
    "Gemma3ForConditionalGeneration": gemma3.BESIDE_IMAGES,
    "DeepseekV2ForCausalLM": deepseek.V2,
    "DeepseekV3ForCausalLM": deepseek.V3,
}
_BOTH = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "DeepseekV3")
SCORED = {  # transformers' classes of a trunk with scores for a head
    **{f"{kind}ForSequenceClassification": FAMILIES[f"{kind}ForCausalLM"] for kind in (*_BOTH, "DeepseekV2")},
    **{f"{kind}ForTokenClassification": FAMILIES[f"{kind}ForCausalLM"] for kind in _BOTH},
    "Gemma3TextForSequenceClassification": gemma3.FAMILY,
}
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_architecture(folder: str | Path) -> Architecture:
    """Read and check `folder/config.json`. Raises ConfigError with the value found and the remedy."""
    folder = Path(folder)
    return architecture_of(_read_json(folder), folder)


def read_scored(folder: str | Path) -> Architecture:
    """The same of a reward model, whose head gives one score (or two, of no and of yes) for each row."""
    folder = Path(folder)
    return scored_architecture_of(_read_json(folder), folder)


def read_trunk(folder: str | Path) -> tuple[Architecture, Architecture | None]:
    """(a reward model's architecture, None) of its folder; of a language model's, the reward model's that is to be made
    of it, and its own. Raises ConfigError."""
    folder = Path(folder)
    raw = _read_json(folder)
    if (raw.get("architectures") or [None])[0] not in FAMILIES:
        return scored_architecture_of(raw, folder), None
    language_model = architecture_of(raw, folder)
    return scored_architecture_of(scored_config(language_model), folder), language_model


def scored_architecture_of(raw: dict[str, Any], folder: Path) -> Architecture:
    """`read_scored` from the file's content; `folder`: whose it is."""
    names = raw.get("architectures") or ["nothing"]
    if names[0] in FAMILIES:
        raise ConfigError(
            f"{folder} is a {names[0]}, whose head gives tokens, not scores; `grpo-mega reward` trains a reward model "
            "from one, or give the folder of a ...ForSequenceClassification"
        )
    arch = architecture_of(raw, folder, SCORED)
    # transformers: num_labels is the length of id2label, by default 2
    labels = len(raw["id2label"]) if raw.get("id2label") else int(raw.get("num_labels") or 2)
    if labels > 2:
        raise ConfigError(
            f"{folder}/config.json has {labels} labels; a reward model has one (its score) or two (no and yes, the "
            "value being the probability of yes)"
        )
    bias = names[0].endswith("ForTokenClassification") and bool(raw.get("token_classification_bias", True))
    return replace(arch, labels=labels, score_bias=bias, tied_embeddings=False)


def scored_config(arch: Architecture) -> dict[str, Any]:
    """config.json of a reward model of one label on a language model's trunk."""
    kind = arch.raw["architectures"][0].removesuffix("ForCausalLM")
    kind = {"Gemma3": "Gemma3Text"}.get(kind, kind)
    return arch.raw | {"architectures": [f"{kind}ForSequenceClassification"], "id2label": {"0": "score"},
                       "label2id": {"score": 0}}  # fmt: skip


def architecture_of(
    raw: dict[str, Any], folder: Path, families: Mapping[str, Family] = MappingProxyType(FAMILIES)
) -> Architecture:
    """The same from the file's content; `folder`: whose it is."""
    names = raw.get("architectures") or ["nothing"]
    if names[0] not in families:
        raise ConfigError(f"{folder}/config.json names the architecture {names[0]!r}; supported: {', '.join(families)}")
    family = families[names[0]]
    try:
        raw = family.text(raw)
        known = {**family.defaults, **raw}
        fields = _fields(known) | family.read(known)
        activation = str(known.get("hidden_act", known.get("hidden_activation", "silu")))
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act={activation!r}; supported: {', '.join(ACTIVATIONS)}")
        result = Architecture(folder=folder, family=family, raw=raw, activation=ACTIVATIONS[activation], **fields)
    except KeyError as missing:
        raise ConfigError(f"{folder}/config.json lacks {missing}; take the folder from the model's publisher") from None
    except ValueError as error:
        if "supported:" in str(error):
            raise ConfigError(f"{folder}/config.json: {error}") from None
        raise ConfigError(f"{folder}/config.json holds a value of the wrong kind: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{folder}/config.json holds a value of the wrong kind: {error}") from None
    _check(result)
    return result


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What all families say in the same words."""
    heads = int(raw["num_attention_heads"])
    return {
        "hidden_size": int(raw["hidden_size"]),
        "num_layers": int(raw["num_hidden_layers"]),
        "num_heads": heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        "ffn_size": int(raw["intermediate_size"]),
        "vocab_size": int(raw["vocab_size"]),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "context_length": int(raw.get("max_position_embeddings", 2048)),
        "ropes": (raw.get("rope_parameters") or raw.get("rope_scaling") or {},),
    }


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist; give a Hugging Face folder (config.json and safetensors)"
        )
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error.strerror}; is it a model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}/config.json is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder}/config.json holds {type(raw).__name__}, not an object")
    return raw


def _check(arch: Architecture) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size"):
        if getattr(arch, name) < 1:
            raise ConfigError(f"{arch.folder}/config.json: {name}={getattr(arch, name)} must be positive")
    for window in arch.windows:
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ConfigError(
                f"{arch.folder}/config.json: sliding_window={window!r} must be a positive number of rows; "
                "leave it out, or null, where layers see their whole past"
            )
    if arch.num_heads % arch.num_kv_heads:
        raise ConfigError(
            f"{arch.folder}/config.json: {arch.num_heads} attention heads are not a multiple of "
            f"{arch.num_kv_heads} key-value heads"
        )
    if arch.num_experts and not 0 < arch.experts_per_token <= arch.num_experts:
        raise ConfigError(
            f"{arch.folder}/config.json: num_experts_per_tok={arch.experts_per_token} of num_local_experts="
            f"{arch.num_experts}; a row passes through at least one and at most all of them"
        )
