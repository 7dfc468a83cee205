"""What a Hugging Face `config.json` says of a model, checked and in our own words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.errors import ConfigError

SUPPORTED = {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "mixtral"}


@dataclass(frozen=True)
class Architecture:
    """Shape of a Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU feed-forward.

    num_experts > 0: each layer's feed-forward is a mixture of that many, of expert_ffn_size channels each, of which a
    row passes through the experts_per_token that its router scores highest; 0: one feed-forward of ffn_size channels.
    """

    folder: Path
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool
    norm_eps: float
    context_length: int
    raw: dict[str, Any]
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's matrices that a row is multiplied with: its cost."""
        attention = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        channels = self.experts_per_token * self.expert_ffn_size if self.num_experts else self.ffn_size
        return self.hidden_size * (attention + 3 * channels + self.num_experts)

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.hidden_size * self.vocab_size


def read_architecture(folder: str | Path) -> Architecture:
    """Read and check `folder/config.json`. Raises ConfigError with the value found and the remedy."""
    folder = Path(folder)
    raw = _read_json(folder)
    names = raw.get("architectures") or ["nothing"]
    if names[0] not in SUPPORTED:
        raise ConfigError(
            f"{folder}/config.json names the architecture {names[0]!r}; supported: {', '.join(SUPPORTED)}"
        )
    try:
        heads = int(raw["num_attention_heads"])
        result = Architecture(
            folder=folder,
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            ffn_size=int(raw["intermediate_size"]),
            vocab_size=int(raw["vocab_size"]),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            context_length=int(raw.get("max_position_embeddings", 2048)),
            raw=raw,
            **_experts(raw, names[0]),
        )
    except KeyError as missing:
        raise ConfigError(f"{folder}/config.json lacks {missing}; take the folder from the model's publisher") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json holds a value of the wrong kind: {error}") from None
    _check(result)
    return result


def _experts(raw: dict[str, Any], name: str) -> dict[str, int]:
    """The mixture's sizes, for architectures that are one."""
    if name != "MixtralForCausalLM":
        return {}
    return {
        "num_experts": int(raw["num_local_experts"]),
        "experts_per_token": int(raw["num_experts_per_tok"]),
        "expert_ffn_size": int(raw["intermediate_size"]),
    }


def check_experts(
    arch: Architecture, tensor: int, expert: int, expert_tensor: int | None, section: str = "parallel"
) -> None:
    """Raise ConfigError unless the mixture's experts can be divided as `section` asks for."""
    if not arch.num_experts:
        if expert > 1 or expert_tensor is not None:
            found = f"{section}.expert={expert}" if expert > 1 else f"{section}.expert_tensor={expert_tensor}"
            raise ConfigError(
                f"{found} divides experts, and {arch.folder} is a {arch.raw['architectures'][0]}, which has none; "
                "leave it out"
            )
        return
    if arch.num_experts % expert:
        fits = [e for e in range(1, arch.num_experts + 1) if arch.num_experts % e == 0]
        raise ConfigError(
            f"{section}.expert={expert} does not divide the model's {arch.num_experts} experts; use expert in {fits}"
        )
    slices = tensor if expert_tensor is None else expert_tensor
    if arch.expert_ffn_size % slices:
        raise ConfigError(
            f"{section}.expert_tensor={slices} does not divide an expert's {arch.expert_ffn_size} feed-forward "
            f"channels; use {math.gcd(arch.expert_ffn_size, slices)}"
        )


def check_layout(
    arch: Architecture, tensor: int, pipeline: int, section: str = "parallel", *, virtual: int = 1
) -> None:
    """Raise ConfigError unless the model can be cut into `tensor` x `pipeline` (x `virtual`) parts."""
    fits = [t for t in range(1, arch.num_heads + 1) if _cuts(arch, t)]
    if tensor not in fits:
        raise ConfigError(
            f"{section}.tensor={tensor} does not divide the model's {arch.num_heads} attention heads, "
            f"{arch.num_kv_heads} key-value heads and {arch.ffn_size} feed-forward channels; use tensor in {fits}"
        )
    if pipeline * virtual > arch.num_layers:
        times = f" x {section}.virtual_pipeline={virtual}" if virtual > 1 else ""
        raise ConfigError(
            f"{section}.pipeline={pipeline}{times} exceeds the model's {arch.num_layers} layers; use at most "
            f"{arch.num_layers}{' together' if virtual > 1 else ''}"
        )


def _cuts(arch: Architecture, tensor: int) -> bool:
    """Whole query heads and feed-forward channels a rank; key-value heads divide the ranks, or ranks divide them."""
    kv_heads = arch.num_kv_heads
    channels = 0 if arch.num_experts else arch.ffn_size  # see `check_experts` for those of experts
    return not (arch.num_heads % tensor or channels % tensor or max(kv_heads, tensor) % min(kv_heads, tensor))


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """The next multiple of 8 x tensor: every rank holds equally many rows, aligned for matrix units."""
    multiple = 8 * tensor
    return -(-vocab_size // multiple) * multiple


def rope_inverse_frequencies(arch: Architecture) -> tuple[Any, float]:
    """(`[head_dim / 2]` float32 radians a position, factor on cos and sin); arXiv:2104.09864, scaling as configured."""
    import torch

    parameters = arch.raw.get("rope_parameters") or arch.raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        theta = float(parameters.get("rope_theta", arch.raw.get("rope_theta", 10000.0)))
        exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
        return 1.0 / theta**exponents, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(
            f"{arch.folder}/config.json asks for rope_type={kind!r}; supported: default, linear, llama3, yarn"
        )
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(dict(arch.raw)))
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


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
    if arch.num_experts and arch.raw.get("sliding_window") and arch.raw["sliding_window"] < arch.context_length:
        raise ConfigError(
            f"{arch.folder}/config.json: sliding_window={arch.raw['sliding_window']} is shorter than the context of "
            f"{arch.context_length}; supported: attention to the whole past (null)"
        )
    for name in ("attention_bias", "mlp_bias"):
        if arch.raw.get(name):
            raise ConfigError(f"{arch.folder}/config.json: {name}=true; supported: matrices without biases")
    if arch.raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{arch.folder}/config.json: hidden_act={arch.raw['hidden_act']!r}; supported: 'silu'")
