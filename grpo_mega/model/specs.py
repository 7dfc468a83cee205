"""The layer spec for machines without Transformer Engine: megatron's linears, our norm and our attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from grpo_mega.model.architecture import Architecture
from grpo_mega.model.attention import NoCoreAttention, Rope, RowAttention
from grpo_mega.model.experts import LINEARS, MixtureLayer, mixture_spec
from grpo_mega.model.latent import LatentAttention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), over the last dimension.

    Under `layernorm_zero_centered_gamma` (megatron's word) it multiplies by 1 + weight, and then computes in
    max(float32, dtype) and rounds once: 1 + weight in bf16 would lose most of a weight's bits.

    Megatron's local norm refuses sequence parallelism; here the weight says `sequence_parallel`, so that megatron sums
    its gradient over the tensor ranks, each of which sees a part of the rows.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps, self.centred = eps, config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (a tensor has no such field)

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = 1 + self.weight.to(wide)
            return nn.functional.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormedRowParallelLinear(RowParallelLinear):
    """megatron's row-parallel linear whose whole output is normed, after the sum over tensor ranks.

    That is where a model norms what attention and feed-forward return before it is added to the hidden states
    (`Architecture.post_norms`); under sequence parallelism each rank norms its rows, as RMSNorm does everywhere.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **more: Any):
        super().__init__(input_size, output_size, config=config, **more)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [T, 1, input_size / tp] -> ([T, 1, output_size], no bias); T / tp rows where sequences are cut."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


class TrunkModel(GPTModel):
    """A GPTModel that ends at the hidden states: its logits never exist. `rope` is set by `build_model`.

    The last stage returns hidden states after the final norm; `parallel/vocab` goes from there to log-probs with
    `output_weight`. (`_postprocess` is where 0.16.1 and 0.19.2 would apply the output layer.)
    """

    rope: Rope

    def _postprocess(self, hidden_states: Tensor, *_, **__) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """[padded vocabulary / tp, H]: this rank's slice of the output layer (last stage only).

        Its layer's forward, whose logits would be whole, is never called; the hooks before it are, by which megatron
        waits for weights that are still on their way (`overlap_param_gather`).
        """
        shared = self.share_embeddings_and_output_weights and self.pre_process
        owner = self.embedding.word_embeddings if shared else self.output_layer
        for hook in owner._forward_pre_hooks.values():
            hook(owner, ())
        return owner.weight


class ModelParts(nn.ModuleList):
    """This rank's stages of the model in model order: one, or one for each of its virtual pipeline stages."""

    def __init__(self, parts: Iterable[TrunkModel]):
        super().__init__(parts)

    def __iter__(self) -> Iterator[TrunkModel]:
        return super().__iter__()  # type: ignore[return-value]

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    @property
    def rope(self) -> Rope:
        return next(iter(self)).rope

    def output_weight(self) -> Tensor:
        """See `TrunkModel.output_weight`: the last part's."""
        *_, last = self
        return last.output_weight()

    def scores(self, hidden: Tensor) -> Tensor:
        """A reward model's head (`model/score`) on [n, H], last stage only: [n, labels]."""
        *_, last = self
        return last.output_layer(hidden)


def layer_spec(arch: Architecture, number: int) -> ModuleSpec:
    """The decoder layer of that number in the model. Names are megatron's local ones (`input_layernorm.weight`)."""
    mixture = arch.is_mixture(number)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=NormedRowParallelLinear)
    feed_forward = ModuleSpec(module=MLP, submodules=linears if arch.post_norms else LINEARS)
    return ModuleSpec(
        module=MixtureLayer if mixture else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention(arch, number),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mixture_spec(arch) if mixture else feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention(arch: Architecture, number: int) -> ModuleSpec:
    if arch.latent is not None:
        params = {"latent": arch.latent, "query_scale": arch.query_scale, "norm": RMSNorm}
        return ModuleSpec(module=LatentAttention, params=params)
    head_norm = RMSNorm if arch.qk_norm else IdentityOp
    return ModuleSpec(
        module=RowAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "window": arch.window(number),
            "rope": arch.rope_of_layer[number] if arch.rope_of_layer else 0,
            "query_scale": arch.query_scale,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=NoCoreAttention,
            linear_proj=NormedRowParallelLinear if arch.post_norms else RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def block_spec(arch: Architecture, first: int, count: int) -> TransformerBlockSubmodules:
    """`count` decoder layers from number `first` on, and the final norm where the stage has it."""
    layers = [layer_spec(arch, number) for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
