"""A megatron-core module for one rank: its pipeline stage's layers, its tensor rank's slices."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from grpo_mega.config import MoeConfig, ParallelConfig
from grpo_mega.model import bridge
from grpo_mega.model.architecture import (
    Architecture,
    check_experts,
    check_layout,
    padded_vocab_size,
)
from grpo_mega.model.attention import Rope
from grpo_mega.model.experts import TopRouter, mixture_settings
from grpo_mega.model.formats import Weights
from grpo_mega.model.layout import first_layer, layers_per_stage
from grpo_mega.model.rotary import rope_inverse_frequencies
from grpo_mega.model.score import ScoreLayer
from grpo_mega.model.specs import ModelParts, TrunkModel, block_spec
from grpo_mega.parallel.mesh import Mesh

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def transformer_config(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str = "none",
    moe: MoeConfig | None = None,
) -> TransformerConfig:
    """megatron's configuration. Every fusion that needs apex or Transformer Engine is off; dropout is 0 in GRPO."""
    layers = layers_per_stage(arch, parallel.stages, parallel.pipeline_layout)
    stages: list[list[str]] = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    full: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective: dict[str, Any] = {"recompute_granularity": "selective"}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        layernorm_zero_centered_gamma=bool(arch.norm_offset),
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[arch.activation],
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=stages if parallel.pipeline > 1 else None,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # a ring of two ranks has forward and backward between the same two: sent in one batch they are taken for each
        # other (p2p_communication.py; Megatron-LM's arguments.py refuses it, megatron-core does not look)
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **{"none": {}, "selective": selective, "full": full}[recompute],
        ffn_hidden_size=arch.ffn_size,
        **mixture_settings(arch, parallel, moe or MoeConfig()),
    )


def _mark_tensor_parallel(model: ModelParts, arch: Architecture, place: bridge.Place) -> None:
    """Say of each tensor that is cut that tensor ranks hold different slices of it, and along which dimension.

    megatron-core 0.16.1 says so only while it initialises weights (tensor_parallel/layers.py), which we leave out;
    0.19.2 says it always, and refuses to be told again. Unsaid, optimizer/clip_grads.py takes slices for copies, and
    the norm that clips changes with the tensor ranks. Matrices of experts are never copies on the ranks that megatron
    adds up over (their optimizer has its own groups), and have their own data-parallel ranks, which 0.16.1 gives them
    (`allreduce`) only where parallel.expert > 1: with expert_tensor != tensor gradients would else miss ranks.
    """
    parameters = dict(model.named_parameters())
    for name, whole, _ in bridge.entries(arch, place):
        weight = parameters[name]
        if whole.expert is not None:
            setattr(weight, "allreduce", False)  # noqa: B010  (a tensor has no such field)
        if whole.row.cut is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=whole.row.cut, stride=1)


def _scale_embedding(part: TrunkModel, scale: float, dtype: torch.dtype) -> None:
    """Multiply what the embedding gives by `scale`, rounded to the weights' dtype as the model's publisher does.

    The weights stay as they are: an output layer that is tied to them is not scaled.
    """
    rounded = torch.tensor(scale, dtype=dtype).item()
    part.embedding.register_forward_hook(lambda module, inputs, output: output * rounded)


def build_model(
    arch: Architecture,
    mesh: Mesh,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    trainable: bool = True,
    loaded: bool = True,
    moe: MoeConfig | None = None,
    tick: bridge.Tick = bridge.silent,
    weights: Weights | None = None,
) -> ModelParts:
    """This rank's part of the model with `weights` (default: of `arch.folder`), read slice by slice, a tick for each;
    or, not `loaded`, with none.

    Raises ConfigError for a layout that cannot cut the model and for a folder that lacks a tensor.
    """
    check_layout(arch, parallel.tensor, parallel.pipeline, virtual=parallel.virtual_pipeline)
    check_experts(arch, parallel.tensor, parallel.expert, parallel.expert_tensor)
    config = transformer_config(arch, parallel, dtype, mesh.device, recompute, moe)
    layers = layers_per_stage(arch, parallel.stages, parallel.pipeline_layout)
    rope = Rope([rope_inverse_frequencies(arch, kind) for kind in range(len(arch.ropes))], mesh.device, dtype)
    parts = []
    for virtual, stage in enumerate(mesh.stages):
        part = TrunkModel(
            config=config,
            transformer_layer_spec=block_spec(arch, first_layer(layers, stage), layers[stage]),
            vocab_size=padded_vocab_size(arch.vocab_size, parallel.tensor),
            max_sequence_length=arch.context_length,
            pre_process=stage == 0,
            post_process=stage == len(layers) - 1,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="none",
            vp_stage=virtual if mesh.virtual > 1 else None,
            pg_collection=mesh.groups,
        )
        if part.post_process and arch.labels:
            part.output_layer = ScoreLayer(config, arch.labels, bias=arch.score_bias)
        part.rope = rope
        if part.pre_process and arch.embedding_scale != 1.0:
            _scale_embedding(part, arch.embedding_scale, dtype)
        parts.append(part)
    model = ModelParts(parts).to(mesh.device)
    place = bridge.Place.of(mesh, layers)
    if loaded:
        bridge.load(model, arch, place, tick, weights)
    _mark_tensor_parallel(model, arch, place)
    model.requires_grad_(trainable)
    for module in model.modules():
        if isinstance(module, TopRouter) and module.expert_bias is not None:
            module.expert_bias.requires_grad_(False)
    return model
