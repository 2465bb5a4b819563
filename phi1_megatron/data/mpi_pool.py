"""The same work on MPI ranks, through mpi4py's own executor.

``mpirun -n N`` (or ``srun --mpi=...``) starts N copies of the same command. Rank 0 plans, hands out
shards and assembles; the others encode. They share a folder, not a network protocol of ours.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from phi1_megatron.errors import LaunchError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4
_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "an mpirun or srun that speaks PMI",
    "SLURM_STEP_NUM_TASKS": "srun",
}

Map = Callable[[Iterable[Any], Callable[[Any], Any]], Iterator[tuple[Any, Any]]]
"""``map(items, job)``: (item, job(item)) in order, read only as needed."""


def launched_tasks(environ: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """How many copies of this command a launcher started, and which launcher; (1, "") if none."""
    for name, launcher in _SIZES.items():
        # A step that Slurm makes for a batch script's own commands has one task.
        if environ.get(name, "").isdigit() and int(environ[name]) > 1:
            return int(environ[name]), launcher
    return 1, ""


@contextmanager
def mpi_map(environ: Mapping[str, str] = os.environ) -> Iterator[tuple[Map, int] | None]:
    """On rank 0 a map over the other ranks, and how many they are; None on the others, which
    encode inside this block until rank 0 is done.

    Raises
    ------
    LaunchError
        mpi4py is missing, or its MPI is not the one that started these processes, so that each
        believes to be alone and they would all write the same files.
    """
    tasks, launcher = launched_tasks(environ)
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise LaunchError(
            f"{launcher} started {tasks} copies of this command, but mpi4py cannot be loaded "
            f"({error}): pip install 'phi1-megatron[mpi]' and an MPI, or start one copy only."
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != tasks:
        library = MPI.Get_library_version().splitlines()[0].strip(" \x00")
        raise LaunchError(
            f"{launcher} started {tasks} copies of this command, but each finds itself among "
            f"{size}: mpi4py runs on {library}, which is not the MPI of that launcher; start it "
            "with that library's own mpirun (or srun --mpi=pmix), or install mpi4py for the other."
        )
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is None:
            yield None
            return

        def ordered(items: Iterable[Any], job: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
            pending: deque[tuple[Any, Any]] = deque()
            for item in items:
                pending.append((item, executor.submit(job, item)))  # type: ignore[attr-defined]
                if len(pending) >= _AHEAD * max(1, size - 1):
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()

        yield ordered, size - 1
