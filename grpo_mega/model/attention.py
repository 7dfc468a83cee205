"""Self-attention over rows: packed sequences when training, cached rows when sampling, through the same weights.

Megatron's modules see a batch of one: hidden states `[T, 1, H]`, T rows that each belong to some sequence. Which rows
may see which is told by a `Rows` object that travels in megatron's `packed_seq_params` argument. Projections, norms
and tensor parallelism are megatron's; only the middle (rotary positions, attention itself) is ours, because the local
core attention of megatron-core 0.16.1 refuses packed sequences and materialises [heads, T, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

BLOCK = 1024  # queries that share one mask, which is then of at most BLOCK x keys


class Rows(Protocol):
    """What attention needs to know about the T rows of one forward."""

    @property
    def cos(self) -> Tensor: ...  # [T, 1, kinds of rotary positions * head_dim], see `Rope`

    @property
    def sin(self) -> Tensor: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d], rotated -> context [T, heads, d].

        window: a row at position i of its sequence sees the one at j iff 0 <= i - j < window (None: its whole past).
        """
        ...


class RowAttention(SelfAttention):
    """megatron's SelfAttention with the rows' own attention in the middle.

    window: how many rows a row of this layer sees, itself included (None: its whole past); rope: which kind of rotary
    positions it has; query_scale: its scores are q k / sqrt(head_dim) * query_scale.
    """

    def __init__(self, *args: Any, window: int | None = None, rope: int = 0, query_scale: float = 1.0, **more: Any):
        super().__init__(*args, **more)
        self.window, self.rope, self.query_scale = window, rope, query_scale

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_, packed_seq_params: Rows, **__):
        """hidden_states [T, 1, H] (T / tp rows under sequence parallelism) -> (output of the same shape, bias)."""
        rows = packed_seq_params
        query, key, value = (part.squeeze(1) for part in self.get_query_key_value_tensors(hidden_states))
        start, width = self.rope * query.shape[-1], query.shape[-1]
        cos, sin = (angles.narrow(-1, start, width) for angles in (rows.cos, rows.sin))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.query_scale != 1.0:
            query = query * self.query_scale
        arguments = self.layer_number, query, key, value, self.window
        if self.config.recompute_granularity == "selective" and self.training:
            context = checkpoint(rows.attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            context = rows.attend(*arguments)
        return self.linear_proj(context.reshape(context.shape[0], 1, -1))


class NoCoreAttention(nn.Module):
    """Fills the spec's core-attention place, which RowAttention never calls."""

    def __init__(self, *_, **__):
        super().__init__()


class Rope(nn.Module):
    """Rotary positions (arXiv:2104.09864): cos and sin of position * inverse frequency, halves side by side.

    A model whose layers differ in them has several kinds, which stand side by side too: kind k is in the entries
    k * head_dim .. (k + 1) * head_dim, and each layer takes its own.
    """

    def __init__(self, kinds: Sequence[tuple[Tensor, float]], device: torch.device, dtype: torch.dtype):
        """kinds: inverse frequencies and factor of each, as `rope_inverse_frequencies` gives them."""
        super().__init__()
        self.kinds = [(inverse_frequencies.to(device), factor) for inverse_frequencies, factor in kinds]
        self.dtype = dtype

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [T] -> cos, sin [T, 1, kinds * head_dim]; angles in float32 like the model's publisher."""
        cos, sin = [], []
        for inverse_frequencies, factor in self.kinds:
            angles = position_ids.float().unsqueeze(1) * inverse_frequencies
            angles = torch.cat((angles, angles), dim=1).unsqueeze(1)
            cos.append((angles.cos() * factor).to(self.dtype))
            sin.append((angles.sin() * factor).to(self.dtype))
        return torch.cat(cos, dim=-1), torch.cat(sin, dim=-1)


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        used = sum(self.lengths)
        if used == 0:
            return query * 0
        parts = list(zip(*(x[:used].split(self.lengths) for x in (query, key, value)), strict=True))
        done = []
        for prefix, run in groupby(range(len(parts)), key=lambda s: self.prefixes[s] if self.prefixes else -1):
            if prefix < 0:
                done += [_causal(parts[s], window) for s in run]
            else:
                done.append(_branches(parts[prefix], [parts[s] for s in run], window))
        return torch.cat(done if used == len(query) else [*done, query[used:] * 0])


def _causal(segment: tuple[Tensor, ...], window: int | None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of one sequence, [L, heads, d]; groups of query heads share a key-value head."""
    query, key, value = segment
    length = len(query)
    if window is None or window >= length:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)
    done = []
    for start in range(0, length, BLOCK):
        stop, first = min(start + BLOCK, length), max(start - window + 1, 0)
        done.append(ends_at_own_row(query[start:stop], key[first:stop], value[first:stop], window))
    return torch.cat(done)


def ends_at_own_row(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, [L, heads, d]: the last query sees every key, the one before it all but one, ...

    and none further back than the window reaches. Every query must see a key.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask = _band(len(query), len(key), window, query.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where a query sees a key: the queries are at the last of the keys' positions."""
    before = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=before)
    return mask if window is None or window >= keys else mask.triu(diagonal=before - window + 1)


def _branches(prefix: tuple[Tensor, ...], branches: list[tuple[Tensor, ...]], window: int | None) -> Tensor:
    """Continuations of one prefix, [sum of their rows, heads, d]: each sees the whole prefix and its own past, or as
    much of both as its window reaches.

    They are padded to one length behind their last rows, where a causal mask hides the padding from every real row.
    """
    if window is not None and window <= len(prefix[1]):  # what even a first row does not see
        prefix = tuple(x[len(x) - window + 1 :] for x in prefix)
    # [G, longest branch, heads, d]
    q, k, v = (pad_sequence(list(several), batch_first=True) for several in zip(*branches, strict=True))
    count, longest = q.shape[:2]
    k, v = (
        torch.cat((x.unsqueeze(0).expand(count, -1, -1, -1), own), dim=1) for x, own in ((prefix[1], k), (prefix[2], v))
    )
    mask = _band(longest, k.shape[1], window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return torch.cat([out[i, : len(branch[0])] for i, branch in enumerate(branches)])
