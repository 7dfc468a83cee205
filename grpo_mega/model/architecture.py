"""What a model is made of, in our own words, and how it can be divided. `families` reads it from config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo_mega.errors import ConfigError
from grpo_mega.model.routing import Router

if TYPE_CHECKING:
    from grpo_mega.model.families.table import Family


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1): widths of what is compressed and of a head's parts.

    A head's query and key have `plain` dimensions without positions and `rotary` dimensions with; its value has
    `value`. Keys and values come from kv_rank dimensions a row, queries from q_rank (None: from the hidden state).
    interleaved: the two numbers that rotary positions turn together are neighbours, not half of `rotary` apart.
    """

    q_rank: int | None
    kv_rank: int
    plain: int
    rotary: int
    value: int
    interleaved: bool = True


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder: RMSNorm, rotary positions, grouped-query or latent attention, gated feed-forward or experts.

    num_experts > 0: the feed-forward of a layer (of those with `mixtures`, if that is given) is a mixture of that many,
    of expert_ffn_size channels each, of which a row passes through experts_per_token, beside shared_ffn_size channels
    that all rows pass through. windows: of each layer, how many rows a row sees, itself included (None, or no windows
    at all: its whole past). ropes: parameters of rotary positions as config.json has them, and rope_of_layer which of
    them a layer has. query_scale: queries are multiplied by it beside the usual 1/sqrt(head_dim). norm_offset: norms
    multiply by weight + norm_offset. post_norms: what attention and feed-forward return is normed before it is added.
    labels: of a reward model, whose head gives that many scores a row, with score_bias added; 0: a language model.
    """

    folder: Path
    family: Family
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
    ropes: tuple[Mapping[str, Any], ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    latent: Latent | None = None
    query_scale: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: Literal[0, 1] = 0
    post_norms: bool = False
    embedding_scale: float = 1.0
    labels: int = 0
    score_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    mixtures: tuple[bool, ...] = ()
    router: Router = field(default_factory=Router)

    def is_mixture(self, layer: int) -> bool:
        return bool(self.num_experts) and (not self.mixtures or self.mixtures[layer])

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that carry positions."""
        return self.latent.rotary if self.latent else self.head_dim

    def size(self, name: str) -> int:
        """The number behind a size in a family's table."""
        latent = self.latent
        sizes = {
            "hidden": self.hidden_size,
            "head": self.head_dim,
            "query": self.num_heads * self.head_dim,
            "key": self.num_kv_heads * self.head_dim,
            "context": self.num_heads * (latent.value if latent else self.head_dim),
            "ffn": self.ffn_size,
            "vocab": self.vocab_size,
            "labels": self.labels,
            "experts": self.num_experts,
            "expert_ffn": self.expert_ffn_size,
            "shared_ffn": self.shared_ffn_size,
        }
        if latent is not None:
            sizes |= {
                "q_rank": latent.q_rank or 0,
                "kv_rank": latent.kv_rank,
                "kv_down": latent.kv_rank + latent.rotary,
                "kv_up": self.num_heads * (latent.plain + latent.value),
            }
        return sizes[name]

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's matrices that a row is multiplied with, on the average: its cost."""
        hidden, size = self.hidden_size, self.size
        if self.latent is None:
            attention = hidden * (size("query") + 2 * size("key") + size("context"))
        else:
            q_rank = self.latent.q_rank
            query = hidden * size("query") if q_rank is None else q_rank * (hidden + size("query"))
            attention = query + hidden * (size("kv_down") + size("context")) + self.latent.kv_rank * size("kv_up")
        mixed = sum(map(self.is_mixture, range(self.num_layers))) / self.num_layers
        channels = self.experts_per_token * self.expert_ffn_size + self.shared_ffn_size
        experts = hidden * (3 * channels + self.num_experts)
        return round(attention + mixed * experts + (1 - mixed) * 3 * hidden * self.ffn_size)

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer, or of a reward model's scores."""
        return self.hidden_size * (self.labels or self.vocab_size)


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
        heads = f"{arch.num_heads} attention heads"
        if arch.latent is None:
            heads += f", {arch.num_kv_heads} key-value heads"
        channels = [f"{count} {kind}feed-forward channels" for count, kind in _channels(arch)]
        raise ConfigError(
            f"{section}.tensor={tensor} does not divide the model's {' and '.join([heads, *channels])}; "
            f"use tensor in {fits}"
        )
    if pipeline * virtual > arch.num_layers:
        times = f" x {section}.virtual_pipeline={virtual}" if virtual > 1 else ""
        raise ConfigError(
            f"{section}.pipeline={pipeline}{times} exceeds the model's {arch.num_layers} layers; use at most "
            f"{arch.num_layers}{' together' if virtual > 1 else ''}"
        )


def _cuts(arch: Architecture, tensor: int) -> bool:
    """Whole query heads and feed-forward channels a rank; key-value heads divide the ranks, or ranks divide them.

    What compresses for latent attention is whole on every rank, and its key-value heads are its query heads.
    """
    kv_heads = arch.num_kv_heads
    if arch.num_heads % tensor or max(kv_heads, tensor) % min(kv_heads, tensor):
        return False
    return not any(count % tensor for count, _ in _channels(arch))


def _channels(arch: Architecture) -> list[tuple[int, str]]:
    """How many feed-forward channels tensor ranks divide, and whose (see `check_experts` for those of experts)."""
    found = []
    if not all(map(arch.is_mixture, range(arch.num_layers))):
        found.append((arch.ffn_size, ""))
    if arch.shared_ffn_size:
        found.append((arch.shared_ffn_size, "shared experts' "))
    return found


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """The next multiple of 8 x tensor: every rank holds equally many rows, aligned for matrix units."""
    multiple = 8 * tensor
    return -(-vocab_size // multiple) * multiple
