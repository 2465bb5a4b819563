"""Who am I: each launcher's environment, as it really looks, whole and broken."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from phi1_megatron.distributed.launch import Place, find_place, start_local_ranks
from phi1_megatron.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29400",
}
SLURM_STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node-[3-4]",
    "SLURM_JOB_NODELIST": "node-[1-4]",
}
SLURM_BATCH_SHELL = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NODELIST": "node-[1-4]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's ``scontrol show hostnames``; it writes down what it was asked."""
    asked = tmp_path / "asked"
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho node-3\necho node-4\n', "utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return asked


def test_a_process_that_nobody_launched_has_no_place() -> None:
    assert find_place({"PATH": "/usr/bin", "HOME": "/home/someone"}) is None


def test_under_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(
        rank=5,
        world_size=8,
        local_rank=1,
        launcher="torchrun",
        master_addr="node-a",
        master_port=29400,
    )


def test_torchrun_inside_a_slurm_step_is_torchrun_s() -> None:
    place = find_place({**SLURM_STEP, **TORCHRUN})
    assert place is not None
    assert (place.launcher, place.rank) == ("torchrun", 5)


def test_a_slurm_step_asks_slurm_for_its_first_host(scontrol: Path) -> None:
    place = find_place(SLURM_STEP)
    assert place is not None
    assert (place.launcher, place.rank, place.world_size, place.local_rank) == ("slurm", 9, 16, 1)
    assert place.master_addr == "node-3"
    assert scontrol.read_text("utf-8").split() == ["show", "hostnames", "node-[3-4]"]


def test_two_slurm_jobs_on_one_node_meet_at_different_ports(scontrol: Path) -> None:
    first = find_place(SLURM_STEP)
    again = find_place({**SLURM_STEP, "SLURM_PROCID": "0"})
    other = find_place({**SLURM_STEP, "SLURM_JOB_ID": "123457"})
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.master_port == again.master_port != other.master_port
    assert 1024 < first.master_port < 65536


def test_a_batch_script_may_name_host_and_port_and_slurm_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    place = find_place({**SLURM_STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 6000)


def test_the_shell_of_a_batch_job_is_no_rank() -> None:
    assert find_place(SLURM_BATCH_SHELL) is None


def test_a_step_without_scontrol_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"first host of 'node-\[3-4\]'.*set MASTER_ADDR"):
        find_place(SLURM_STEP)


def test_a_step_whose_nodes_slurm_does_not_know_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "scontrol"
    command.write_text("#!/bin/sh\n", "utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(LaunchError, match=r"names no host in 'node-\[3-4\]'; set MASTER_ADDR"):
        find_place(SLURM_STEP)


def test_under_open_mpi_on_one_machine_no_address_is_needed() -> None:
    place = find_place(OPEN_MPI)
    assert place == Place(3, 4, 3, "mpi", "127.0.0.1", 29500)


def test_under_mpich() -> None:
    place = find_place({**MPICH, "MASTER_ADDR": "node-a", "MASTER_PORT": "7000"})
    assert place == Place(2, 4, 0, "mpi", "node-a", 7000)


@pytest.mark.parametrize("environ", [MPICH, {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}])
def test_mpi_on_several_hosts_needs_the_first_one_s_address(environ: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"mpirun started 4 ranks on several hosts.*MASTER_ADDR"):
        find_place(environ)


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_mpirun_inside_a_slurm_job_is_mpi_s(mpirun: dict[str, str]) -> None:
    # its daemons are a Slurm step, and every process of a node inherits its daemon's SLURM_PROCID
    place = find_place({**SLURM_STEP, **mpirun, "MASTER_ADDR": "node-3"})
    assert place is not None
    assert (place.launcher, place.world_size) == ("mpi", 4)


def test_srun_that_speaks_pmi_is_still_slurm_s() -> None:
    environ = {**SLURM_STEP, "PMI_RANK": "9", "PMI_SIZE": "16", "MASTER_ADDR": "node-3"}
    place = find_place(environ)
    assert place is not None
    assert (place.launcher, place.rank, place.local_rank) == ("slurm", 9, 1)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({**TORCHRUN, "RANK": "one"}, "RANK"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT"),
        ({**SLURM_STEP, "MASTER_ADDR": "a", "SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4.0"}, "OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_a_number_that_is_none_is_named(environ: dict[str, str], name: str) -> None:
    with pytest.raises(LaunchError, match=f"environment variable {name} is '"):
        find_place(environ)


def test_a_step_that_lacks_a_variable_is_told_which() -> None:
    environ = {name: text for name, text in SLURM_STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(LaunchError, match="SLURM_LOCALID is None"):
        find_place({**environ, "MASTER_ADDR": "a"})


@pytest.mark.parametrize("rank", ["8", "-1"])
def test_a_rank_beyond_the_world_is_refused(rank: str) -> None:
    with pytest.raises(LaunchError, match=f"torchrun gave this process rank {rank} of 8; .* to 7"):
        find_place({**TORCHRUN, "RANK": rank})


RANK_SCRIPT = """
import os, pathlib, signal, sys
from phi1_megatron.distributed.launch import find_place
place = find_place()
folder, failing, how = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(folder / f"rank{place.rank}").write_text(f"{place.world_size} {place.local_rank}")
if place.rank == failing:
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else sys.exit(3)
if failing >= 0:
    signal.pause()
"""


def ranks_command(folder: Path, failing: int = -1, how: str = "") -> list[str]:
    return [sys.executable, "-c", RANK_SCRIPT, str(folder), str(failing), how]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torch leaves the ranks' logs open
def test_local_ranks_are_started_and_find_their_places(tmp_path: Path) -> None:
    start_local_ranks(ranks_command(tmp_path), 2, tmp_path / "logs")
    assert (tmp_path / "rank0").read_text("utf-8") == "2 0"
    assert (tmp_path / "rank1").read_text("utf-8") == "2 1"


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torch leaves the ranks' logs open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("how", "said"), [("exits", "exited with code 3"), ("killed", "was killed by SIGKILL")]
)
def test_a_rank_that_fails_ends_the_others_and_is_named(
    tmp_path: Path, how: str, said: str
) -> None:
    # the other rank waits for ever: only the launcher ends it
    with pytest.raises(LaunchError, match=f"rank 1 {said}; .*logs"):
        start_local_ranks(ranks_command(tmp_path, failing=1, how=how), 2, tmp_path / "logs")
    gc.collect()
