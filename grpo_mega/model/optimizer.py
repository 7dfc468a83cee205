"""Megatron's gradient buffers, Adam and learning-rate schedule around a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from grpo_mega.config import OptimizerConfig
from grpo_mega.model.specs import ModelParts
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Mesh


def wrap_for_training(
    model: ModelParts, mesh: Mesh, *, distributed: bool = False, overlap: bool = False
) -> list[DistributedDataParallel]:
    """Contiguous gradient buffers in max(fp32, parameter dtype) around each part of the model, summed over data- and
    context-parallel ranks, divided once by R.

    distributed: for the distributed optimizer, each of those ranks gets the sum of its part of the buffer alone.
    overlap: sums begin while the backward still runs; with `distributed`, an update's weights arrive while the next
    forward runs (see `settle`).
    """
    in_fp32 = model.config.params_dtype.itemsize < 8  # megatron would keep fp64 gradients in fp32, too
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=in_fp32,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
        use_distributed_optimizer=distributed,
    )
    wrapped = [
        DistributedDataParallel(config=model.config, ddp_config=config, module=part, pg_collection=mesh.groups)
        for part in model
    ]
    no_syncs = [part.no_sync for part in wrapped]
    model.config.no_sync_func = no_syncs if mesh.virtual > 1 else no_syncs[0]
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    model: Sequence[DistributedDataParallel], settings: OptimizerConfig, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with clipping by the global norm, and its schedule.

    bf16 weights get float32 main weights, which AdamW moves and which the weights are rounded from. With
    `settings.distributed` main weights and Adam's states are sharded over the data-parallel ranks. Weight decay leaves
    norms and biases alone. `scheduler.step(1)` is called once before the updates of each training step, so step s (from
    0) warms up with lr * (s + 1) / warmup_steps and no step runs at a learning rate of 0.
    """
    wrapped = model[0]
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=wrapped.config.params_dtype,
        bf16=wrapped.config.params_dtype == torch.bfloat16,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=wrapped.ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, list(model), config_overrides=get_standard_config_overrides(config))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):  # neither Transformer Engine's nor apex's
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over memory in place of ten: six times as fast on a CPU
        if isinstance(part, DistributedOptimizer):
            _mend_loading(part)
            _allocate_states(part)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=num_steps + 1,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def gather_gradients(model: Sequence[DistributedDataParallel]) -> None:
    """Make every rank's `main_grad` whole, where the distributed optimizer leaves each with a part of it. A diagnosis:
    training never needs it. Every rank must call, between a backward and the next."""
    for part in model:
        for group in (*part.bucket_groups, *part.expert_parallel_bucket_groups):
            if part.ddp_config.use_distributed_optimizer:
                ranks = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    mine = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()]
                    bucket.grad_data.copy_(collectives.gather(mine, ranks).flatten())


def settle(model: Sequence[DistributedDataParallel]) -> None:
    """Wait for the weights of the last update, where they are gathered late: before anything but a forward reads them.

    Every rank must call.
    """
    for part in model:
        if part.ddp_config.overlap_param_gather:
            part.start_param_sync(force_sync=True)


@torch.no_grad()
def start_main_weights(optimizer: MegatronOptimizer, values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Give bf16 weights' float32 main weights the numbers of the model's folder; values: see `bridge.tensors`.

    megatron takes them from the bf16 weights. Each then starts in the middle between two roundings, and nothing of what
    AdamW does to it is seen by the model until it has moved by half a last place, 1e-3 of its size or more, which at
    a learning rate of 1e-5 takes dozens of steps. From where a float32 folder has them, the nearest move at once.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for parameter, value in values:
        main = getattr(parameter, "main_param", None)
        if main is None:  # the distributed optimizer keeps it on other ranks
            continue
        if getattr(parameter, "main_param_sharded", False):
            owner = next(part for part in parts if parameter in part.model_param_gbuf_map)
            mine = owner._get_model_param_range_map(parameter)["param"]
            value = value.flatten()[mine.start : mine.end]
        main.copy_(value)


def _mend_loading(optimizer: DistributedOptimizer) -> None:
    """Let a fully reshardable checkpoint fill torch's AdamW, whose `step` is a state of each parameter.

    That format keeps the step with the parameter groups. megatron (distrib_optimizer.py, 0.16.1) hands all parameters
    one step tensor, which AdamW would then count up once a parameter instead of once an update: each gets its own. Then
    _set_main_param_and_optimizer_states asks the loaded tensors for the step, which they lack.
    """
    fill = optimizer._set_main_param_and_optimizer_states

    def with_own_step(parameter, tensors):
        group, place = optimizer.model_param_group_index_map[parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][place]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        fill(parameter, tensors)

    optimizer._set_main_param_and_optimizer_states = with_own_step


def _allocate_states(optimizer: DistributedOptimizer) -> None:
    """What torch's AdamW makes in its first step: without it megatron's state_dict (distrib_optimizer.py) cannot be
    asked for before that step, when a checkpoint is loaded."""
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
