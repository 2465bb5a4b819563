"""What a preprocessing benchmark found: figures that stand for themselves in a JSON file."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from phi1_megatron import __version__
from phi1_megatron.benchmark.contenders import MegatronLM
from phi1_megatron.benchmark.process_tree import PeakMemory
from phi1_megatron.errors import DataError

_PACKAGES = (
    *("tokenizers", "transformers", "megatron-core", "torch", "numpy"),
    *("msgspec", "fastokens", "gigatoken"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One contender with one tokenizer.

    Attributes
    ----------
    megabytes
        Millions of bytes of text that it read.
    seconds
        Of each timed run, start to exit.
    processor_seconds
        User and system time of each of them, over all its processes.
    digests
        SHA-256 of the .bin and the .idx.
    bin_bytes
        Size of the .bin.
    compared
        Were its bytes compared with ours?
    difference
        Where its bytes part from ours; None where they do not, or where there is no comparison.
    failure
        Why there is no figure.
    """

    tokenizer: str
    key: str
    name: str
    command: tuple[str, ...]
    megabytes: float
    documents: int
    seconds: tuple[float, ...] = ()
    processor_seconds: tuple[float, ...] = ()
    memory: PeakMemory | None = None
    memory_in_timed_run: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    bin_bytes: int = 0
    compared: bool = False
    difference: str | None = None
    failure: str | None = None

    @property
    def is_ours(self) -> bool:
        """Is this ``phi1 preprocess`` itself?"""
        return self.key == "ours"

    @property
    def median_seconds(self) -> float | None:
        """None where it failed."""
        return median(self.seconds) if self.seconds and self.failure is None else None

    @property
    def megabytes_per_second(self) -> float | None:
        """None where it failed."""
        return None if self.median_seconds is None else self.megabytes / self.median_seconds


@dataclass(frozen=True, slots=True)
class MemoryCheck:
    """Ours on the input, and on the same input several times over."""

    tokenizer: str
    times: int
    once: PeakMemory | None
    repeated: PeakMemory | None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that was measured in one run.

    Attributes
    ----------
    input_wanted_megabytes
        What the corpus should have had; None for an input that was given.
    load_before
        The machine's load average over the minute before.
    """

    input_description: str
    input_megabytes: float
    input_wanted_megabytes: float | None
    input_documents: int
    input_sha256: str
    workers: int
    repeats: int
    load_before: float
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: tuple[Row, ...]
    memory_checks: tuple[MemoryCheck, ...]
    measured_at: str = field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )

    def label(self, row: Row) -> str:
        """The contender's name, and how much it read where that is not the whole input."""
        if row.megabytes == self.input_megabytes:
            return row.name
        return f"{row.name} ({_short(row.megabytes)} MB)"

    def times_faster(self, row: Row) -> float | None:
        """How many times as fast ours is on the same input; None where a figure is missing."""
        for mine in self.rows:
            same = (mine.tokenizer, mine.megabytes) == (row.tokenizer, row.megabytes)
            if same and mine.is_ours and mine.median_seconds and row.median_seconds:
                return row.median_seconds / mine.median_seconds
        return None

    def notes(self) -> list[str]:
        """What to know before believing the figures."""
        said = [
            "Whole processes, start to exit. The input and every program were read once before: "
            "all find them in the page cache, which only root could empty."
        ]
        if self.input_wanted_megabytes and self.input_megabytes < self.input_wanted_megabytes:
            said.append(
                f"Only {self.input_megabytes:,.1f} MB of Python sources are installed here, of "
                f"the {self.input_wanted_megabytes:,.0f} MB asked for."
            )
        parts = {row.megabytes for row in self.rows if row.megabytes != self.input_megabytes}
        if parts:
            said.append(
                f"Rows marked {_short(min(parts))} MB ran on that beginning of the input only, and "
                "are compared with ours on those: start-up weighs more there than in the whole."
            )
        said.append(
            "Peak memory is of the whole process tree: PSS counts a shared page once, RSS once in "
            "each process. Fast contenders are sampled in an untimed run of their own."
        )
        said.append(
            "HF tokenizers is encode_batch_fast. A transformers tokenizer calls encode_batch, "
            "which is slower."
        )
        if self.load_before > 0.25 * self.machine["usable_cores"]:
            said.append(
                f"The machine was not idle when this began (load average {self.load_before:.2f} "
                "over the last minute): other work makes every figure worse."
            )
        if not any(row.key.startswith("megatron_lm") for row in self.rows):
            said.append("Megatron-LM was not measured: name a checkout with --megatron-lm.")
        return said

    @property
    def is_sound(self) -> bool:
        """Did ours run, with the same bytes as every peer that ran?"""
        return not (
            any(row.difference for row in self.rows)
            or any(row.failure for row in self.rows if row.is_ours)
            or any(check.failure for check in self.memory_checks)
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the derived figures beside the measured ones."""
        content = asdict(self) | {"notes": self.notes()}
        for told, row in zip(content["rows"], self.rows, strict=True):
            told["median_seconds"] = row.median_seconds
            told["megabytes_per_second"] = row.megabytes_per_second
            told["ours_is_times_faster"] = self.times_faster(row)
        return content

    def write(self, path: Path) -> None:
        """Write the figures as JSON, whole or not at all.

        Raises
        ------
        DataError
            The file cannot be written.
        """
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(self.as_dict())))
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataError(f"{path} could not be written: {error.strerror or error}.") from error


def _short(megabytes: float) -> str:
    return f"{megabytes:,.{0 if megabytes >= 10 else 1}f}"


def machine_facts() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, kernel."""
    return {
        "cpu": cpu_model(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the kernel tells no name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def version_facts(megatron_lm: MegatronLM | None) -> dict[str, str]:
    """Versions of everything that was measured, in this interpreter and in Megatron-LM's."""
    found = {"phi1_megatron": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if megatron_lm is not None:
        commit = _first_line(["git", "-C", str(megatron_lm.folder), "rev-parse", "HEAD"])
        found["megatron_lm_commit"] = commit
        script = (
            "from importlib.metadata import version as v; import platform as p; "
            "print('python', p.python_version(), 'tokenizers', v('tokenizers'), "
            "'transformers', v('transformers'), 'torch', v('torch'))"
        )
        found["megatron_lm_python"] = _first_line([str(megatron_lm.python), "-c", script])
    return found


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else "unknown"
