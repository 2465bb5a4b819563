"""Who am I among the ranks, and who starts them.

A process finds its place from the environment that torchrun, Slurm or MPI gave it. Where none did,
``start_local_ranks`` starts the ranks of one machine through torch's own elastic launcher; each of
them then finds its place as under torchrun. No torch is imported until ranks are started.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi1_megatron.errors import LaunchError

DEFAULT_PORT = 29500
OUR_LAUNCHER = "phi1"
"""``Place.launcher`` of ranks that ``start_local_ranks`` started."""
_OURS = "PHI1_LAUNCHED"


@dataclass(frozen=True)
class Place:
    """One process among the ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    master_addr: str
    master_port: int


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place as its launcher tells it; None where no launcher started it.

    Raises:
        LaunchError: a launcher started this process, but its environment does not say enough.
    """
    # mpirun before Slurm: inside a job it starts its daemons with srun, and what they start
    # inherits the daemon's SLURM_PROCID, one number for a whole node.
    for find in (_under_torchrun, _under_mpirun, _under_slurm):
        place = find(environ)
        if place is not None:
            if not 0 <= place.rank < place.world_size:
                raise LaunchError(
                    f"{place.launcher} gave this process rank {place.rank} of {place.world_size}; "
                    f"ranks run from 0 to {place.world_size - 1}"
                )
            return place
    return None


def _under_torchrun(environ: Mapping[str, str]) -> Place | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank = _number(environ, "RANK")
    return Place(
        rank=rank,
        world_size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK", default=rank),
        launcher=OUR_LAUNCHER if _OURS in environ else "torchrun",
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT", default=DEFAULT_PORT),
    )


def _under_slurm(environ: Mapping[str, str]) -> Place | None:
    # A batch script sees SLURM_PROCID too; only a step (srun) has SLURM_STEP_ID.
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    # A step of one task is somebody's shell, or one command that is to start its own ranks.
    if _number(environ, "SLURM_NTASKS") == 1:
        return None
    job = _number(environ, "SLURM_JOB_ID", default=0)
    master_addr = environ.get("MASTER_ADDR") or _first_slurm_host(environ)
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_NTASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        launcher="slurm",
        master_addr=master_addr,
        # Every rank must name the same port, and two jobs on one node must not: so by job id.
        master_port=_number(environ, "MASTER_PORT", default=20000 + job % 20000),
    )


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"the first host of {nodes!r} could not be asked of Slurm ({' '.join(command)}: "
            f"{error}); set MASTER_ADDR in the batch script"
        ) from None
    hosts = answer.stdout.split()
    if not hosts:
        raise LaunchError(f"Slurm names no host in {nodes!r}; set MASTER_ADDR in the batch script")
    return hosts[0]


_MPIRUN_VARIABLES = (
    (  # Open MPI
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
"""Where an mpirun tells rank, ranks in all, rank on this host, ranks on this host."""


def _under_mpirun(environ: Mapping[str, str]) -> Place | None:
    for rank, size, local_rank, local_size in _MPIRUN_VARIABLES:
        # srun --mpi=pmi2 sets PMI_RANK too, but no local rank: those processes are Slurm's.
        by_srun = "SLURM_STEP_ID" in environ and local_rank not in environ
        if rank in environ and size in environ and not by_srun:
            return _place_by_mpirun(environ, rank, size, local_rank, local_size)
    return None


def _place_by_mpirun(
    environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str
) -> Place:
    world_size = _number(environ, size)
    one_machine = _number(environ, local_size, default=0) == world_size
    master_addr = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else None)
    if master_addr is None:
        raise LaunchError(
            f"mpirun started {world_size} ranks on several hosts and MASTER_ADDR is not set; "
            "export it with the first host's address (mpirun -x MASTER_ADDR=...)"
        )
    return Place(
        rank=_number(environ, rank),
        world_size=world_size,
        local_rank=_number(environ, local_rank, default=_number(environ, rank)),
        launcher="mpi",
        master_addr=master_addr,
        master_port=_number(environ, "MASTER_PORT", default=DEFAULT_PORT),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(
            f"the environment variable {name} is {text!r}; a launcher sets it to a whole number"
        ) from None


def start_local_ranks(command: Sequence[str], num_processes: int, log_dir: Path) -> None:
    """Run ``command`` as ``num_processes`` ranks on this machine, and wait for them.

    Rank 0 has this terminal; the others write to ``log_dir``. When one rank fails, the rest are
    ended at once.

    Raises:
        LaunchError: a rank failed; the message names the first one, how it ended and its log.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    log_dir.mkdir(parents=True, exist_ok=True)
    os.environ[_OURS] = "1"
    # Seconds between SIGTERM and SIGKILL: a step and a save must fit. torch's default is 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # The error raised below says what torch's launcher would log, and says it once.
    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    to_files = dict.fromkeys(range(1, num_processes), Std.ALL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{_free_port()}",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir), redirects=to_files),
    )
    try:
        elastic_launch(launch, entrypoint=command[0])(*command[1:])
    except ChildFailedError as error:
        raise LaunchError(_first_failure(error, log_dir)) from None
    except SignalException as stop:
        name = signal.Signals(stop.sigval).name
        raise LaunchError(f"stopped by {name}; the ranks were told to save and end") from None
    finally:
        del os.environ[_OURS]


def _first_failure(error: object, log_dir: Path) -> str:
    failures = list(getattr(error, "failures", {}).values())
    first = min(failures, key=_how_late)
    if first.exitcode < 0:
        how = f"was killed by {signal.Signals(-first.exitcode).name}"
    else:
        how = f"exited with code {first.exitcode}"
    return f"rank {first.local_rank} {how}; the output of ranks above 0 is in {log_dir}"


def _how_late(failure: Any) -> tuple[int, int]:
    """Where a failed rank stands among those of one moment; the first is the cause.

    A rank that was killed goes before those that exited: what its peers raise is only the closed
    connection. Last are those that the launcher itself told to end.
    """
    if failure.exitcode == -signal.SIGTERM:
        return 2, failure.timestamp
    return int(failure.exitcode >= 0), failure.timestamp


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
