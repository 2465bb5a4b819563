"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from phi1_megatron.checkpoint.folder import Progress, list_checkpoints
from phi1_megatron.checkpoint.store import (
    TrainingState,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from phi1_megatron.config.load import to_toml
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import (
    BlendedSamples,
    RunData,
    micro_batches,
    open_data,
    unigram_entropy,
)
from phi1_megatron.distributed.initialize import (
    choose_device,
    data_parallel_rank,
    parallel_context,
)
from phi1_megatron.distributed.launch import Place
from phi1_megatron.distributed.layout import Layout
from phi1_megatron.errors import Phi1Error
from phi1_megatron.models.phi1 import build_model
from phi1_megatron.training.metrics import MetricsWriter, StepMetrics
from phi1_megatron.training.optimizer import (
    build_optimizer,
    build_scheduler,
    follow_recipe,
    whole_parameters,
    wrap_data_parallel,
)
from phi1_megatron.training.resilience import StopRequest
from phi1_megatron.training.step import run_schedule

_HOPELESS_STEPS = 20
"""Overflows in a row at the smallest loss scale after which a run gives up."""


class TrainingError(Phi1Error):
    """The run cannot go on: the loss or the gradient is not a number."""


@dataclass
class Run:
    """A run in progress on this rank."""

    config: RunConfig
    run_dir: Path
    layout: Layout
    data: RunData
    state: TrainingState
    step: int = 0
    hopeless_steps: int = 0
    """Steps skipped in a row at the smallest loss scale."""

    @property
    def consumed_samples(self) -> int:
        """Samples of all steps so far."""
        return self.step * self.config.training.global_batch_size


def train(config: RunConfig, run_dir: Path, place: Place | None) -> None:
    """Train to the recipe's last step, from the newest checkpoint in ``run_dir`` if there is one.

    Every rank calls this. A stop signal ends it early, with a checkpoint.
    """
    with parallel_context(config, place) as layout, StopRequest().listening() as stop:
        run = start(config, run_dir, layout)
        with _writer(run) as writer:
            _announce(run, writer)
            _loop(run, writer, stop)


def start(config: RunConfig, run_dir: Path, layout: Layout) -> Run:
    """Build the model, optimizer and data on this rank, and resume or initialise."""
    run_dir.mkdir(parents=True, exist_ok=True)
    device = choose_device(config.training.device)
    bare = build_model(config, device)
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints and config.checkpoint.initialize_from:
        load_weights(Path(config.checkpoint.initialize_from), config, bare)
    chunks = wrap_data_parallel(config, bare)
    optimizer = build_optimizer(config, chunks)
    state = TrainingState(chunks, optimizer, build_scheduler(config, optimizer))
    run = Run(config, run_dir, layout, open_data(config, run_dir), state)
    if checkpoints:
        run.step = load_checkpoint(checkpoints[-1], state, layout.describe()).step
        follow_recipe(config, optimizer, state.scheduler)
    if dist.get_rank() == 0:
        (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return run


def _loop(run: Run, writer: MetricsWriter | None, stop: StopRequest) -> None:
    training = run.config.training
    batches = [_batches(run, run.data.training) for _ in run.state.chunks]
    while run.step < training.train_steps:
        metrics = train_step(run, batches)
        if training.eval_interval and (
            run.step % training.eval_interval == 0 or run.step == training.train_steps
        ):
            metrics = _with_validation(run, metrics)
        if writer:
            writer.write(metrics)
        stopping = stop.agreed()
        if stopping or _save_is_due(run):
            with whole_parameters(run.config, run.state.chunks):
                save_checkpoint(run.run_dir, run.config, run.state, _progress(run))
        if stopping:
            if writer:
                writer.say(
                    f"stopped by {stop.asked_by or 'another rank'} after step {run.step}, "
                    "saved; the same command goes on from here"
                )
            return


def train_step(run: Run, batches: list[Any]) -> StepMetrics:
    """Forward, backward, update: one global batch."""
    config, state = run.config, run.state
    began = time.perf_counter()
    for chunk in state.chunks:
        chunk.train()
        cast(DistributedDataParallel, chunk).zero_grad_buffer()
    state.optimizer.zero_grad()
    learning_rate = max(group["lr"] for group in state.optimizer.param_groups)
    loss = run_schedule(config, run.layout, state.chunks, batches)
    _stop_unless_finite(run, "loss", loss)
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(increment=1)
        _stop_unless_finite(run, "gradient norm", grad_norm)
    loss_scale = float(state.optimizer.get_loss_scale().item())
    _stop_if_hopeless(run, updated, loss_scale)
    run.step += 1
    seconds = time.perf_counter() - began
    tokens = config.training.global_batch_size * config.data.seq_length
    return StepMetrics(
        step=run.step,
        loss=loss,
        grad_norm=float(grad_norm) if updated else None,
        learning_rate=learning_rate,
        consumed_tokens=run.step * tokens,
        tokens_per_second=tokens / seconds,
        loss_scale=loss_scale,
        skipped=not updated,
    )


def _stop_unless_finite(run: Run, name: str, value: float) -> None:
    # Under fp16 an overflow is expected now and then: the loss scale answers it.
    if run.config.training.precision == "fp16" or math.isfinite(value):
        return
    first = run.step * run.config.training.global_batch_size
    raise TrainingError(
        f"the {name} of step {run.step + 1} is {value} (samples {first} to "
        f"{first + run.config.training.global_batch_size - 1} of the run); lower optimizer.lr, or "
        "look at these samples"
    )


def _stop_if_hopeless(run: Run, updated: bool, loss_scale: float) -> None:
    """fp16 answers an overflow by a lower loss scale; at the lowest, nothing is learnt any more."""
    # megatron-core keeps the scale in fp32: allow for its rounding.
    at_the_bottom = loss_scale <= run.config.training.min_loss_scale * (1 + 1e-6)
    run.hopeless_steps = 0 if updated or not at_the_bottom else run.hopeless_steps + 1
    if run.hopeless_steps >= _HOPELESS_STEPS:
        raise TrainingError(
            f"{run.hopeless_steps} steps in a row overflowed at the smallest loss scale "
            f"({loss_scale:g} = training.min_loss_scale), the last of them step {run.step + 1}; "
            "lower optimizer.lr, or train with training.precision=bf16"
        )


def _with_validation(run: Run, metrics: StepMetrics) -> StepMetrics:
    return StepMetrics(**{**vars(metrics), "validation_loss": validate(run)})


def validate(run: Run) -> float | None:
    """Mean loss over the first ``eval_steps`` global batches of the validation data, always the
    same ones; None where the run has none."""
    samples = run.data.validation
    if samples is None:
        return None
    batches = [_batches(run, samples, first_sample=0) for _ in run.state.chunks]
    for chunk in run.state.chunks:
        chunk.eval()
    losses = []
    with torch.no_grad(), whole_parameters(run.config, run.state.chunks):
        for _ in range(run.config.training.eval_steps):
            losses.append(
                run_schedule(run.config, run.layout, run.state.chunks, batches, forward_only=True)
            )
    return sum(losses) / len(losses)


def _batches(run: Run, samples: BlendedSamples, first_sample: int | None = None) -> Any:
    return micro_batches(
        samples,
        run.config,
        run.layout,
        data_parallel_rank(),
        run.consumed_samples if first_sample is None else first_sample,
        pin_memory=torch.cuda.is_initialized(),
    )


def _save_is_due(run: Run) -> bool:
    interval = run.config.checkpoint.save_interval
    at_interval = interval > 0 and run.step % interval == 0
    return at_interval or run.step == run.config.training.train_steps


def _progress(run: Run) -> Progress:
    return Progress(
        step=run.step, consumed_samples=run.consumed_samples, layout=run.layout.describe()
    )


def _writer(run: Run) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    if dist.get_rank() == 0:
        entropy = unigram_entropy(run.config)
        return MetricsWriter(run.config, run.run_dir, run.step, entropy)
    return contextlib.nullcontext()


def _announce(run: Run, writer: MetricsWriter | None) -> None:
    if writer is None:
        return
    training, layout = run.config.training, run.layout
    writer.say(f"{layout.describe()}, {training.precision}, {choose_device(training.device)}")
    writer.say(
        f"a step: {training.global_batch_size} samples = {training.micro_batch_size} micro "
        f"x {layout.data} data-parallel x {layout.num_microbatches} accumulated"
    )
    if run.step:
        writer.say(f"resumed after step {run.step} of {training.train_steps}")
