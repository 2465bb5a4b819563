"""Start a training run: check what can be checked once, then start the ranks or be one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from phi1_megatron.checkpoint.folder import check_resumable, check_same_model, find_checkpoint
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import check_data
from phi1_megatron.distributed.launch import (
    OUR_LAUNCHER,
    Place,
    start_local_ranks,
)
from phi1_megatron.distributed.layout import model_parallel_size, plan_layout
from phi1_megatron.distributed.lifetime import end_with_parent
from phi1_megatron.errors import LaunchError, Phi1Error

FAILURE = "failure.txt"


def launch_training(
    config: RunConfig,
    recipe: Path,
    overrides: Sequence[str],
    run_dir: Path,
    num_processes: int | None,
) -> None:
    """Check the run, then train on this machine with as many ranks as it takes.

    Raises:
        LaunchError: a rank failed; the message names the first and where its traceback lies.
    """
    ranks = num_processes or default_num_processes(config)
    check_run(config, run_dir, ranks)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FAILURE).unlink(missing_ok=True)
    if ranks == 1:
        train_on_this_rank(config, run_dir, None)
        return
    command = [sys.executable, "-m", "phi1_megatron", "train", str(recipe), *overrides]
    try:
        start_local_ranks([*command, "--run-dir", str(run_dir)], ranks, run_dir / "logs")
    except LaunchError as error:
        raise LaunchError(_with_reason(str(error), run_dir)) from None


def default_num_processes(config: RunConfig) -> int:
    """One rank for each GPU; on the CPU one copy of the model."""
    import torch

    from phi1_megatron.distributed.initialize import choose_device

    if choose_device(config.training.device) == "cuda":
        return torch.cuda.device_count()
    return model_parallel_size(config.parallel)


def check_run(config: RunConfig, run_dir: Path, ranks: int) -> None:
    """Everything that would stop the run before its first step, asked before it starts.

    Raises:
        Phi1Error: layout, device, data, or a checkpoint to start from does not fit.
    """
    plan_layout(config, ranks)
    check_data(config)
    check_resumable(run_dir, config)
    if config.checkpoint.initialize_from:
        source = find_checkpoint(Path(config.checkpoint.initialize_from))
        check_same_model(source, config.model)
    from phi1_megatron.distributed.initialize import choose_device
    from phi1_megatron.models.transformer_config import uses_transformer_engine

    uses_transformer_engine(config, choose_device(config.training.device))


def train_on_this_rank(config: RunConfig, run_dir: Path, place: Place | None) -> None:
    """Be one rank of the run. A failure leaves its traceback in ``failure.txt``.

    Ranks of another launcher check the run here; ``launch_training`` has done it for its own and
    for a run of one rank (no ``place``).
    """
    if config.parallel.tensor_model_parallel_size > 1:
        # One queue keeps communication and the products it overlaps in the order they were given
        # (Megatron-LM's own requirement for tensor parallelism); read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from phi1_megatron.training.resilience import record_failure

    rank = place.rank if place else 0
    started_by_us = place is not None and place.launcher == OUR_LAUNCHER
    if started_by_us:
        end_with_parent()
    try:
        if place is not None and not started_by_us:
            if rank == 0:
                (run_dir / FAILURE).unlink(missing_ok=True)
            check_run(config, run_dir, place.world_size)
        from phi1_megatron.training.trainer import train

        train(config, run_dir, place)
    except Exception as error:
        first = record_failure(run_dir / FAILURE, rank, error)
        if started_by_us or not first:
            sys.exit(1)  # the command that started this rank, or the first one to fail, tells it
        if isinstance(error, Phi1Error):
            raise
        raise LaunchError(
            f"training failed on rank {rank}: {type(error).__name__}: {error}; traceback: "
            f"{run_dir / FAILURE}"
        ) from error


def _with_reason(message: str, run_dir: Path) -> str:
    failure = run_dir / FAILURE
    if not failure.exists():
        return message
    lines = [line for line in failure.read_text(encoding="utf-8").splitlines() if line.strip()]
    reason = lines[-1].removeprefix("phi1_megatron.errors.")
    return f"{message}\n{lines[0]} {reason}\nthe whole traceback: {failure}"
