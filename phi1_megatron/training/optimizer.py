"""Data parallelism, optimizer and schedule: megatron-core's, set up from a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.models.phi1 import unwrap
from phi1_megatron.models.transformer_config import PARAMS_DTYPE
from phi1_megatron.training.adamw import GroupStepAdamW


def wrap_data_parallel(config: RunConfig, chunks: list[nn.Module]) -> list[nn.Module]:
    """Each model chunk in megatron-core's DDP: one gradient buffer, reduced over the copies."""
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            unwrap(chunk).config,
            ddp,
            chunk,
            # Only the first chunk's buckets are needed early in the backward pass.
            disable_bucketing=index > 0 or not parallel.overlap_grad_reduce,
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(config: RunConfig, chunks: list[nn.Module]) -> MegatronOptimizer:
    """megatron-core's optimizer over wrapped chunks: fp32, mixed precision or distributed."""
    training, adam = config.training, config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        min_lr=config.scheduler.min_lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.adam_beta1,
        adam_beta2=adam.adam_beta2,
        adam_eps=adam.adam_eps,
        clip_grad=adam.clip_grad,
        fp16=training.precision == "fp16",
        bf16=training.precision == "bf16",
        params_dtype=PARAMS_DTYPE[training.precision],
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # None asks megatron-core for its default: no decay of biases and norms.
    overrides: dict[object, object] | None = {} if adam.decay_norm_and_bias else None
    _give_megatron_an_adam()
    optimizer = megatron_optimizer.get_megatron_optimizer(optimizer_config, chunks, overrides)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Moments now, not at the first update: a checkpoint may be asked for before it.
        part.init_state_fn(part.optimizer)
    for chunk in chunks:
        model_config = unwrap(chunk).config
        model_config.grad_scale_func = optimizer.scale_loss
        model_config.finalize_model_grads_func = finalize_model_grads
        if config.parallel.overlap_grad_reduce:
            model_config.no_sync_func = (
                chunk.no_sync if len(chunks) == 1 else [part.no_sync for part in chunks]
            )
    return optimizer


def _give_megatron_an_adam() -> None:
    """Where neither TransformerEngine nor apex gives megatron-core an Adam, give it ours.

    Both of its modules then treat the step count as theirs would: one number for each group.
    """
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_TE_OPTIMIZER = True


@contextlib.contextmanager
def whole_parameters(config: RunConfig, chunks: list[nn.Module]) -> Iterator[None]:
    """Within this context every rank's weights are the newest.

    With ``overlap_param_gather`` the shares that other ranks updated arrive only during the next
    forward pass, so a checkpoint taken before it would hold some of the step before.
    """
    if not config.parallel.overlap_param_gather:
        yield
        return
    wrapped = [cast(DistributedDataParallel, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in wrapped:
        chunk.enable_forward_pre_hook()


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then decay; counted in steps."""
    scheduler = config.scheduler
    decay_steps = scheduler.decay_steps or config.training.train_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=scheduler.init_lr,
        max_lr=config.optimizer.lr,
        min_lr=scheduler.min_lr,
        lr_warmup_steps=scheduler.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=scheduler.decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=config.training.train_steps,
        wd_incr_style="constant",
        # A resumed run takes from its checkpoint how far it is; what to do there, from its recipe.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def follow_recipe(
    config: RunConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Give a resumed optimizer the recipe's settings; a checkpoint brings those of its own time."""
    adam = config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = adam.lr, config.scheduler.min_lr
        group["betas"], group["eps"] = (adam.adam_beta1, adam.adam_beta2), adam.adam_eps
    scheduler.step(increment=0)
