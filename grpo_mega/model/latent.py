"""Multi-head latent attention (arXiv:2405.04434, section 2.1): keys and values of a row come from a few numbers of it.

With h a row's hidden state, [a | b] a concatenation, and per head i:

    [c | r] = W_down h                the row's compressed keys and values, and the one rotary key that heads share
    [k_i | v_i] = W_up,i norm(c)      a head's plain key and its value
    [q_i | s_i] = W_q,i h             a head's query; or of norm(W_q,down h), which is narrower
    context_i = attention of queries [q_i | rope(s_i)] over keys [k_i | rope(r)] and values v_i

What compresses is whole on every tensor rank, heads are divided. Under sequence parallelism each rank compresses its
own rows, and what travels is compressed; the sum over ranks that those weights' gradients then want is megatron's, as
for norms. The shared rotary key goes to the heads of all ranks, so that its gradient is a sum over them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_mega.model.architecture import Latent
from grpo_mega.model.attention import Rows, rotate

EPS = 1e-6  # of the norms of what is compressed, whatever rms_norm_eps: so in the publisher's code


class Norm(Protocol):
    """How a norm over `hidden_size` is made."""

    def __call__(self, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module: ...


class Compression(nn.Module):
    """x W^T, whole on every tensor rank; its gradient is summed over them where each has rows of its own."""

    def __init__(self, config: TransformerConfig, wide: int, narrow: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(narrow, wide, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (a tensor has no such field)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):
    """The attention of a layer, under megatron's names, over `Rows` like `RowAttention`.

    Values are made as wide as keys by zeros, so that caches and other ranks get keys and values of one shape, and the
    context is cut back. query_scale: see Architecture.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        latent: Latent,
        query_scale: float,
        norm: Norm,
        pg_collection: Any,
        **_,
    ):
        super().__init__(config)
        self.layer_number, self.latent, self.query_scale = layer_number, latent, query_scale
        self.tp_group = pg_collection.tp
        heads, hidden = config.num_attention_heads, config.hidden_size
        query = heads * (latent.plain + latent.rotary)
        if latent.q_rank is None:
            self.linear_q_proj = self._for_heads(hidden, query)
        else:
            self.linear_q_down_proj = Compression(config, hidden, latent.q_rank)
            self.q_layernorm = norm(config, hidden_size=latent.q_rank, eps=EPS)
            self.linear_q_up_proj = self._for_heads(latent.q_rank, query)
        self.linear_kv_down_proj = Compression(config, hidden, latent.kv_rank + latent.rotary)
        self.kv_layernorm = norm(config, hidden_size=latent.kv_rank, eps=EPS)
        self.linear_kv_up_proj = self._for_heads(latent.kv_rank, heads * (latent.plain + latent.value))
        self.linear_proj = RowParallelLinear(
            heads * latent.value, hidden, config=config, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, tp_group=self.tp_group,
        )  # fmt: skip

    def _for_heads(self, size: int, channels: int) -> ColumnParallelLinear:
        """To channels of heads, which tensor ranks divide; under sequence parallelism from own rows to all rows."""
        config = self.config
        return ColumnParallelLinear(
            size, channels, config=config, init_method=config.init_method, bias=False, tp_group=self.tp_group
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_, packed_seq_params: Rows, **__):
        """hidden_states [T, 1, H] (T / tp rows under sequence parallelism) -> (output of the same shape, bias)."""
        rows = packed_seq_params
        query = self._query(hidden_states, rows)
        key, value = self._key_value(hidden_states, rows)
        if self.config.recompute_granularity == "selective" and self.training:
            context = checkpoint(
                rows.attend, self.layer_number, query, key, value, use_reentrant=False, preserve_rng_state=False
            )
        else:
            context = rows.attend(self.layer_number, query, key, value)
        context = context[..., : self.latent.value]
        return self.linear_proj(context.reshape(context.shape[0], 1, -1))

    def _query(self, hidden: Tensor, rows: Rows) -> Tensor:
        """[T, heads / tp, plain + rotary], rotated."""
        latent = self.latent
        if latent.q_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        query = query.squeeze(1).unflatten(1, (-1, latent.plain + latent.rotary))
        plain, rotary = query.split((latent.plain, latent.rotary), dim=-1)
        query = torch.cat((plain, self._turn(rotary, rows)), dim=-1)
        return query if self.query_scale == 1.0 else query * self.query_scale

    def _key_value(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Both [T, heads / tp, plain + rotary]: the value is followed by zeros."""
        latent = self.latent
        compressed, shared = self.linear_kv_down_proj(hidden).split((latent.kv_rank, latent.rotary), dim=-1)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        plain, value = up.squeeze(1).unflatten(1, (-1, latent.plain + latent.value)).split(
            (latent.plain, latent.value), dim=-1
        )  # fmt: skip
        shared = self._turn(self._for_all_heads(shared), rows)
        key = torch.cat((plain, shared.expand(-1, plain.shape[1], -1)), dim=-1)
        return key, F.pad(value, (0, key.shape[-1] - latent.value))

    def _for_all_heads(self, shared: Tensor) -> Tensor:
        """[T or T / tp, 1, rotary] -> [T, 1, rotary], whose gradient is summed over the tensor ranks' heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                shared.contiguous(), tensor_parallel_output_grad=True, group=self.tp_group
            )
        return copy_to_tensor_model_parallel_region(shared, group=self.tp_group)

    def _turn(self, x: Tensor, rows: Rows) -> Tensor:
        """x [T, heads, rotary] by the row's angles. Where neighbours are pairs they are put half a head apart first:
        queries and keys alike, which no product of the two sees."""
        if self.latent.interleaved:
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return rotate(x, rows.cos, rows.sin)
