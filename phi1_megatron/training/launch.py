"""Start a training run: check what can be checked once, then start the ranks or be one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from phi1_megatron.checkpoint.folder import check_resumable
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import check_data
from phi1_megatron.distributed.launch import Place, start_local_ranks
from phi1_megatron.distributed.layout import model_parallel_size, plan_layout
from phi1_megatron.errors import LaunchError, Phi1Error


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
    plan_layout(config, ranks)
    check_data(config)
    check_resumable(run_dir, config)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "failure.txt").unlink(missing_ok=True)
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


def train_on_this_rank(config: RunConfig, run_dir: Path, place: Place | None) -> None:
    """Be one rank of the run. A failure leaves its traceback in ``failure.txt``."""
    quiet_expected_warnings()
    if config.parallel.tensor_model_parallel_size > 1:
        # One queue keeps communication and the products it overlaps in the order they were given
        # (Megatron-LM's own requirement for tensor parallelism); read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from phi1_megatron.training.resilience import record_failure

    try:
        if place is not None and place.rank == 0:
            plan_layout(config, place.world_size)
            check_data(config)
            check_resumable(run_dir, config)
        from phi1_megatron.training.trainer import train

        train(config, run_dir, place)
    except Phi1Error as error:
        record_failure(run_dir, place.rank if place else 0, error)
        raise
    except Exception as error:
        record_failure(run_dir, place.rank if place else 0, error)
        raise LaunchError(
            f"training failed: {type(error).__name__}: {error} (traceback: "
            f"{run_dir / 'failure.txt'})"
        ) from error


def _with_reason(message: str, run_dir: Path) -> str:
    failure = run_dir / "failure.txt"
    if not failure.exists():
        return message
    lines = [line for line in failure.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"{message}\n{lines[0]} {lines[-1]}\nits whole traceback: {failure}"


def quiet_expected_warnings() -> None:
    """Warnings of megatron-core and torch about megatron-core's own calls, which no user can mend;
    phi1 doctor tells in one table what is installed."""
    for category, message in (
        (UserWarning, ".*Apex (is|are) not installed.*"),
        (UserWarning, ".*Transformer Engine and Apex are not installed.*"),
        (UserWarning, ".*full scope is deprecated.*"),
        (UserWarning, ".*The .grad attribute of a Tensor that is not a leaf.*"),
        (FutureWarning, ".*torch.distributed.*is deprecated.*"),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
