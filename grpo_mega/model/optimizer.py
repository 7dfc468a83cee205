"""Megatron's gradient buffers, Adam and learning-rate schedule around a model."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from grpo_mega.config import OptimizerConfig
from grpo_mega.model.specs import TrunkModel


def wrap_for_training(model: TrunkModel) -> DistributedDataParallel:
    """Contiguous gradient buffers in max(fp32, parameter dtype), summed over data-parallel ranks, divided once by R."""
    in_fp32 = model.config.params_dtype.itemsize < 8  # megatron would keep fp64 gradients in fp32, too
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(config=model.config, ddp_config=config, module=model)
    model.config.no_sync_func = wrapped.no_sync
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, settings: OptimizerConfig, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with clipping by the global norm, and its schedule.

    Weight decay leaves norms and biases alone. `scheduler.step(1)` is called once before the updates of each training
    step, so step s (from 0) warms up with lr * (s + 1) / warmup_steps and no step runs at a learning rate of 0.
    """
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=model.module.config.params_dtype,
        use_distributed_optimizer=False,
    )
    optimizer = get_megatron_optimizer(config, [model], config_overrides=get_standard_config_overrides(config))
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
