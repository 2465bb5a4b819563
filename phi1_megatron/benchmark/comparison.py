"""What contenders write, and whether it is the same, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".bin", ".idx")

_CHUNK_BYTES = 1 << 20


def output_files(prefix: Path) -> tuple[Path, ...]:
    """The ``.bin`` and the ``.idx`` that a contender writes for ``--output-prefix``."""
    return tuple(Path(f"{prefix}_text_document{suffix}") for suffix in SUFFIXES)


def digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of each file, by suffix."""
    return {path.suffix: _sha256(path) for path in output_files(prefix)}


def first_difference(ours: Path, theirs: Path) -> str | None:
    """Where the files of two prefixes part; None where they are the same."""
    for mine, other in zip(output_files(ours), output_files(theirs), strict=True):
        if _sha256(mine) != _sha256(other):
            sizes = f"{mine.stat().st_size:,} bytes ours, {other.stat().st_size:,} theirs"
            place = _first_different_byte(mine, other)
            return f"the {mine.suffix} differs from byte {place:,} on ({sizes})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_different_byte(mine: Path, other: Path) -> int:
    place = 0
    with mine.open("rb") as one, other.open("rb") as two:
        while (a := one.read(_CHUNK_BYTES)) == (b := two.read(_CHUNK_BYTES)):
            assert a, f"{mine} and {other} are equal"
            place += len(a)
    shared = min(len(a), len(b))
    return place + next((i for i in range(shared) if a[i] != b[i]), shared)
