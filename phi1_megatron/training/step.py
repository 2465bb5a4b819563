"""One step's arithmetic: forward and backward through megatron-core's schedules, and the loss.

Losses are means over tokens, in nats. Tokens are ``[b, s]``; the model's per-token losses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import Batch, to_device
from phi1_megatron.distributed.initialize import (
    data_parallel_group,
    is_last_stage,
    last_stage_rank,
    pipeline_group,
)
from phi1_megatron.distributed.layout import Layout


def run_schedule(
    config: RunConfig,
    layout: Layout,
    chunks: list[nn.Module],
    batches: Sequence[Iterator[Batch]],
    *,
    forward_only: bool = False,
) -> float:
    """One global batch through every stage; gradients are left in the DDP buffers.

    Args:
        batches: an iterator over this rank's micro batches for each model chunk.

    Returns:
        The mean loss of the whole global batch, the same number on every rank.
    """
    schedule = get_forward_backward_func()
    reports: list[Tensor] = schedule(
        forward_step_func=partial(_forward_step, layout=layout),
        data_iterator=list(batches) if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=layout.num_microbatches,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    return _mean_loss(reports)


def _forward_step(batches: Iterator[Batch], model: nn.Module, layout: Layout) -> tuple[Tensor, Any]:
    """megatron-core's forward step: the stage's output, and what makes a loss of it."""
    batch = to_device(next(batches), torch.cuda.current_device())
    if layout.context > 1:
        batch = get_batch_on_this_cp_rank(batch)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_sum_losses, batch["loss_mask"])


def _sum_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of tokens (megatron-core divides), and both to report ``[2]``."""
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    return total, num_tokens.int(), torch.stack([total.detach(), num_tokens])


def _mean_loss(reports: list[Tensor]) -> float:
    """Mean over micro batches and data-parallel ranks, told to the other pipeline stages."""
    if is_last_stage():
        sums = torch.stack(reports).sum(dim=0).double()
        dist.all_reduce(sums, group=data_parallel_group())
    else:
        sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    dist.broadcast(sums, src=last_stage_rank(), group=pipeline_group())
    total, num_tokens = sums.tolist()
    return float(total / num_tokens)
