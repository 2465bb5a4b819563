"""The machine as the probes see it: programs, imports and places that tests can replace."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType


def import_apart(module: str) -> str | None:
    """Import ``module`` in a process of its own; the reason why that failed, or None.

    Compiled extensions can abort on import (a wrong CUDA library, an MPI without its launcher),
    which no ``except`` in this process would see.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "the import did not end within 120 s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the import was killed by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the import exited with {done.returncode}"


def first_line(command: Sequence[str]) -> str:
    """Run a command that prints its version; its first line, or why there is none."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer ({type(error).__name__})"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "no version printed"


@dataclass(frozen=True)
class Machine:
    """What the probes ask. Tests put a machine of their making in its place."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    working_directory: Path = field(default_factory=Path.cwd)
    shared_memory: Path = Path("/dev/shm")
    nvidia_driver: Path = Path("/proc/driver/nvidia/version")
    which: Callable[[str], str | None] = shutil.which
    first_line: Callable[[Sequence[str]], str] = first_line
    import_here: Callable[[str], ModuleType] = importlib.import_module
    import_apart: Callable[[str], str | None] = import_apart

    def has_gpu(self) -> bool:
        """Does torch see a CUDA device? No, if there is no torch to ask."""
        try:
            return bool(self.import_here("torch").cuda.is_available())
        except (ImportError, OSError, RuntimeError):
            return False  # the probe of torch tells why


def version_of(distribution: str) -> str | None:
    """Find the installed version of a package without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def declared_range(distribution: str) -> str:
    """The versions of a package that our own metadata asks for; empty where it is not installed."""
    try:
        requirements = metadata.requires("phi1-megatron") or []
    except metadata.PackageNotFoundError:
        return ""
    from packaging.requirements import Requirement

    ranges = (Requirement(text) for text in requirements)
    return next((str(r.specifier) for r in ranges if r.name == distribution and not r.marker), "")


def outside_range(distribution: str, version: str) -> str:
    """A sentence where ``version`` is not one we declare, else nothing."""
    wanted = declared_range(distribution)
    if wanted:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(wanted).contains(version, prereleases=True):
            return f"{version} is outside {wanted}, the versions this project was tried with"
    return ""
