"""Where the commands begin: before the command line is read, and its libraries are loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def main() -> NoReturn:
    """The ``phi1`` command."""
    if sys.argv[1:2] == ["preprocess"]:
        _begin_preprocessing(sys.argv[2:])
    from phi1_megatron.cli import main as command

    command()


def preprocess_tool() -> NoReturn:
    """``tools/preprocess/preprocess_data.py``."""
    _begin_preprocessing(sys.argv[1:])
    from phi1_megatron.cli import run_single

    run_single("phi1_megatron.commands.preprocess:preprocess", prog="preprocess_data.py")


def _begin_preprocessing(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Start the process that will do the work, unless an MPI started this one, or help is asked."""
    from phi1_megatron.data.mpi_pool import launched_tasks

    if launched_tasks(environ)[0] > 1 or {"--help", "-h", "--version"} & set(arguments):
        return
    # Libraries' own threads would only get in the workers' way, and one thread can be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from phi1_megatron.commands import runner
    from phi1_megatron.commands.preprocessing import warm

    runner.start(warm)
