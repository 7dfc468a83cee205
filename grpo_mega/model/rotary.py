"""Rotary positions as a model's publisher scales them: frequencies from the parameters in config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_mega.errors import ConfigError
from grpo_mega.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("default", "linear", "llama3", "yarn")


def rope_inverse_frequencies(arch: Architecture, kind: int = 0) -> tuple[Tensor, float]:
    """(`[rope_dim / 2]` float32 radians a position, factor on cos and sin) of `arch.ropes[kind]`.

    theta^(-2i/d) (arXiv:2104.09864), scaled as the parameters say. Raises ConfigError for an unknown rope_type.
    """
    import torch

    parameters = dict(arch.ropes[kind])
    name = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta", arch.raw.get("rope_theta", 10000.0)))
    if name == "default":
        exponents = torch.arange(0, arch.rope_dim, 2, dtype=torch.int64).float() / arch.rope_dim
        return 1.0 / theta**exponents, 1.0
    if name not in KINDS:
        raise ConfigError(f"{arch.folder}/config.json asks for rope_type={name!r}; supported: {', '.join(KINDS)}")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        head_dim=arch.rope_dim,
        max_position_embeddings=arch.context_length,
        rope_parameters={**parameters, "rope_type": name, "rope_theta": theta},
    )
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.float(), float(rotary.attention_scaling)
