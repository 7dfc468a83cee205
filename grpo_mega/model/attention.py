"""Self-attention over rows: packed sequences when training, cached rows when sampling, through the same weights.

Megatron's modules see a batch of one: hidden states `[T, 1, H]`, T rows that each belong to some sequence. Which rows
may see which is told by a `Rows` object that travels in megatron's `packed_seq_params` argument. Projections, norms
and tensor parallelism are megatron's; only the middle (rotary positions, attention itself) is ours, because the local
core attention of megatron-core 0.16.1 refuses packed sequences and materialises [heads, T, T].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


class Rows(Protocol):
    """What attention needs to know about the T rows of one forward."""

    @property
    def cos(self) -> Tensor: ...  # [T, 1, head_dim]

    @property
    def sin(self) -> Tensor: ...

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
        if self.config.recompute_granularity == "selective" and self.training:
            context = checkpoint(
                rows.attend, self.layer_number, query, key, value, use_reentrant=False, preserve_rng_state=False
            )
        else:
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
    """Rows of whole sequences, one after the other: causal attention within each, none across, none for padding.

    lengths: rows of each segment; what is left of T is padding. prefixes: for each segment the number of the segment
    whose rows it goes on from and sees whole, or -1 (Microbatch.prefixes; empty: none has one). Segments with the same
    prefix stand together, behind it. routing: what a mixture's routers are told (`model/experts`).
    """

    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    routing: Any = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used = sum(self.lengths)
        if used == 0:
            return query * 0
        parts = list(zip(*(x[:used].split(self.lengths) for x in (query, key, value)), strict=True))
        done = []
        for prefix, run in groupby(range(len(parts)), key=lambda s: self.prefixes[s] if self.prefixes else -1):
            if prefix < 0:
                done += [_causal(*parts[s]) for s in run]
            else:
                done.append(_branches(parts[prefix], [parts[s] for s in run]))
        return torch.cat(done if used == len(query) else [*done, query[used:] * 0])


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of one sequence, [L, heads, d]; groups of query heads share a key-value head."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)


def _branches(prefix: tuple[Tensor, ...], branches: list[tuple[Tensor, ...]]) -> Tensor:
    """Continuations of one prefix, [sum of their rows, heads, d]: each sees the whole prefix and its own past.

    They are padded to one length behind their last rows, where a causal mask hides the padding from every real row.
    """
    # [G, longest branch, heads, d]
    q, k, v = (pad_sequence(list(several), batch_first=True) for several in zip(*branches, strict=True))
    count, longest, shared = q.shape[0], q.shape[1], len(prefix[1])
    k, v = (
        torch.cat((x.unsqueeze(0).expand(count, -1, -1, -1), own), dim=1) for x, own in ((prefix[1], k), (prefix[2], v))
    )
    mask = torch.ones(longest, shared + longest, dtype=torch.bool, device=q.device).tril(diagonal=shared)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return torch.cat([out[i, : len(branch[0])] for i, branch in enumerate(branches)])
