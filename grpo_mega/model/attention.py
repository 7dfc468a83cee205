"""Self-attention over rows: packed sequences when training, cached rows when sampling, through the same weights.

Megatron's modules see a batch of one: hidden states `[T, 1, H]`, T rows that each belong to some sequence. Which rows
may see which is told by a `Rows` object that travels in megatron's `packed_seq_params` argument. Projections, norms
and tensor parallelism are megatron's; only the middle (rotary positions, attention itself) is ours, because the local
core attention of megatron-core 0.16.1 refuses packed sequences and materialises [heads, T, T].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn


class Rows(Protocol):
    """What attention needs to know about the T rows of one forward."""

    cos: Tensor  # [T, 1, head_dim]
    sin: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d], rotated -> context [T, heads, d]."""
        ...


class RowAttention(SelfAttention):
    """megatron's SelfAttention with the rows' own attention in the middle."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_, packed_seq_params: Rows, **__):
        """hidden_states [T, 1, H] (T / tp rows under sequence parallelism) -> (output of the same shape, bias)."""
        rows = packed_seq_params
        query, key, value = (part.squeeze(1) for part in self.get_query_key_value_tensors(hidden_states))
        query, key = rotate(query, rows.cos, rows.sin), rotate(key, rows.cos, rows.sin)
        context = rows.attend(self.layer_number, query, key, value)
        return self.linear_proj(context.reshape(context.shape[0], 1, -1))


class NoCoreAttention(nn.Module):
    """Fills the spec's core-attention place, which RowAttention never calls."""

    def __init__(self, *_, **__):
        super().__init__()


class Rope(nn.Module):
    """Rotary positions (arXiv:2104.09864): cos and sin of position * inverse frequency, halves side by side."""

    def __init__(self, inverse_frequencies: Tensor, factor: float, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.inverse_frequencies = inverse_frequencies.to(device)
        self.factor, self.dtype = factor, dtype

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [T] -> cos, sin [T, 1, head_dim]; angles in float32 like the model's publisher."""
        angles = position_ids.float().unsqueeze(1) * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=1).unsqueeze(1)
        return (angles.cos() * self.factor).to(self.dtype), (angles.sin() * self.factor).to(self.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, d] turned by the row's angles: x cos + (-x2, x1) sin, x1 and x2 being the halves of d."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


@dataclass(frozen=True)
class PackedRows:
    """Rows of whole sequences, one after the other: causal attention within each, none across, none for padding."""

    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...]  # rows of each segment; what is left of T is padding

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used = sum(self.lengths)
        if used == 0:
            return query * 0
        parts = zip(*(x[:used].split(self.lengths) for x in (query, key, value)), strict=True)
        done = [_causal(*part) for part in parts]
        return torch.cat(done if used == len(query) else [*done, query[used:] * 0])


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of one sequence, [L, heads, d]; key-value heads are shared by groups of query heads."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)
