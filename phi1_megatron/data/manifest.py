"""What a run of preprocessing was asked for, kept in its work folder so that it can be resumed.

``{output_prefix}.parts`` holds the manifest, the shards' parts and records, and what is assembled
of them; it is gone when the run is done. A run with other options or inputs is refused by the name
of what differs: a finished shard is never silently used for something else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec
import xxhash

from phi1_megatron.data.assembly import write_whole
from phi1_megatron.data.inputs import STDIN
from phi1_megatron.data.shards import Planned
from phi1_megatron.errors import DataError

_FORMAT = 1
_LOCK_SECONDS = 2.0  # the workers of a run just killed take a moment to follow it


class Manifest(msgspec.Struct):
    """A run's inputs, options and plan.

    Attributes
    ----------
    inputs
        Each input and its size in bytes (0 for standard input).
    options
        What decides the bytes that are written, by the name of the flag.
    plan
        The shards.
    """

    inputs: dict[str, int]
    files: tuple[str, ...]
    options: dict[str, str]
    plan: tuple[Planned, ...] = ()
    format: int = _FORMAT


def work_folder(output_prefix: Path) -> Path:
    """Where a run keeps what is not done."""
    return output_prefix.with_name(f"{output_prefix.name}.parts")


def begin(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of an unfinished run of the same inputs and options; None where there is none.

    Raises
    ------
    DataError
        The folder holds a run that was asked for something else.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        begun = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove {folder} to start afresh."
        ) from error
    for name, value in wanted.options.items():
        before = begun.options.get(name, "unknown")
        if before != value:
            raise _other(folder, f"with {name} {before}, and now {name} is {value}")
    for name in begun.files:
        if name not in wanted.inputs:
            raise _other(folder, f"with the input {name}, which is not named now")
    for name, size in wanted.inputs.items():
        if name not in begun.inputs:
            raise _other(folder, f"without the input {name}")
        if begun.inputs[name] != size:
            raise _other(
                folder, f"when the input {name} held {begun.inputs[name]:,} bytes, not {size:,}"
            )
    if begun.files != wanted.files:
        raise _other(folder, "with the same inputs in another order")
    return begun


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Keep what the run was asked for."""
    write_whole(
        folder / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the work folder against a second run of the same output.

    Raises
    ------
    DataError
        Another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise DataError(
            f"the work folder {folder} could not be made: {error.strerror or error}."
        ) from error
    with file:
        if not _lock(file):
            file.seek(0)
            raise DataError(
                f"{folder} is in use by {file.read().strip() or 'another run'}; wait for it, or "
                "choose another --output-prefix."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return True  # a shared file system without locks: nothing holds it, nothing can
        else:
            return True


def remove(folder: Path) -> None:
    """Remove the work folder of a run that is done, or that did nothing worth keeping."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def input_hashes(files: Sequence[str], digests: Sequence[tuple[str, str]]) -> dict[str, str]:
    """One XXH3-128 for each input: its only stretch's, or that of its stretches' digests joined.

    ``digests`` are (input, digest of a stretch) in order.
    """
    gathered: dict[str, list[str]] = {"<stdin>" if name == STDIN else name: [] for name in files}
    for name, digest in digests:
        gathered[name].append(digest)
    return {
        name: parts[0] if len(parts) == 1 else xxhash.xxh3_128("".join(parts).encode()).hexdigest()
        for name, parts in gathered.items()
    }


def _other(folder: Path, how: str) -> DataError:
    return DataError(
        f"{folder} holds an unfinished run that was begun {how}; repeat that run's command to go "
        "on with it, choose another --output-prefix, or remove the folder to start afresh."
    )
