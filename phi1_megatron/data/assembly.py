"""Shards' parts, one after the other, to data sets that appear whole or not at all.

Everything grows inside the run's work folder. Parts are removed only when what they were copied
into is on disk and :class:`Progress` says so; the last step, renaming into place, is a list that is
written down first and can be gone through again. So a run can be killed at any moment.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np

from phi1_megatron.data.indexed import write_index
from phi1_megatron.data.shard_encoder import ShardRecord, drop_parts, part_paths
from phi1_megatron.errors import DataError

_SYNC_BYTES = 4 << 30  # of ids; when they are on disk, the parts they came from are removed
_COPY_BYTES = 1 << 20


class KeyProgress(msgspec.Struct, array_like=True):
    """How much of one key's data set is in place."""

    bytes: int = 0
    sequences: int = 0
    documents: int = 0


class Progress(msgspec.Struct):
    """How far the assembly is known to be on disk: ``shards`` of them."""

    shards: int
    keys: list[KeyProgress]


class Assembly:
    """Appends shards' parts in order to each key's data set, and writes its index.

    Parameters
    ----------
    folder
        The run's work folder.
    keys
        How many keys there are.
    dtype
        Of the ids.
    """

    def __init__(self, folder: Path, keys: int, dtype: np.dtype[Any]) -> None:
        self.folder, self._dtype = folder, dtype
        self.progress = self._read_progress(keys)
        self._unsynced: list[int] = []
        self._unsynced_bytes = 0
        self._stack = ExitStack()
        self._files: list[dict[str, BinaryIO]] = []

    def __enter__(self) -> Assembly:
        with self._one_sentence():
            for key, known in enumerate(self.progress.keys):
                sizes = {
                    "bin": known.bytes,
                    "lengths": 4 * known.sequences,
                    # Truncating an empty file to 8 zero bytes writes the first mark: document 0
                    # begins at sequence 0.
                    "marks": 8 + 8 * known.documents,
                }
                files = {}
                for what, size in sizes.items():
                    path = self._path(key, what)
                    mode = "r+b" if path.is_file() else "w+b"
                    file = self._stack.enter_context(path.open(mode))
                    file.truncate(size)
                    file.seek(size)
                    files[what] = cast(BinaryIO, file)
                self._files.append(files)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # What a full disk kept from being written must not fail a second time here.
            for files in self._files:
                for file in files.values():
                    try:
                        file.close()
                    except OSError:
                        continue
        self._stack.close()

    def append(self, record: ShardRecord) -> None:
        """Add the next shard. One that was in place before this run began is passed over.

        Raises
        ------
        DataError
            Nothing more can be written.
        """
        if record.number < self.progress.shards:
            return
        assert record.number == self.progress.shards, (record.number, self.progress.shards)
        with self._one_sentence():
            for key, (known, files) in enumerate(zip(self.progress.keys, self._files, strict=True)):
                paths = part_paths(self.folder, record.number, key)
                copied = _append(paths["bin"], files["bin"])
                assert copied == record.keys[key].bytes, (paths["bin"], copied)
                _append(paths["lengths"], files["lengths"])
                for counts in _blocks(paths["sequences"]):
                    marks = known.sequences + np.cumsum(counts, dtype=np.int64)
                    files["marks"].write(marks.astype("<i8").tobytes())
                    known.sequences = int(marks[-1])
                known.bytes += copied
                known.documents += record.documents
                _begin_writeback(files["bin"], known.bytes - copied, copied)
            self.progress.shards += 1
            self._unsynced.append(record.number)
            self._unsynced_bytes += sum(key.bytes for key in record.keys)
            if self._unsynced_bytes >= _SYNC_BYTES:
                self.sync()

    def sync(self) -> None:
        """Bring everything to disk, write that down, and only then remove the parts."""
        with self._one_sentence():
            for files in self._files:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            write_whole(self.folder / "progress.json", msgspec.json.encode(self.progress))
            for number in self._unsynced:
                drop_parts(self.folder, number, len(self._files))
        self._unsynced, self._unsynced_bytes = [], 0

    def finish(self) -> tuple[tuple[Path, Path], ...]:
        """Write the indices; gives the .bin and the .idx of each key, on disk, in the folder."""
        finished = []
        with self._one_sentence():
            for key, (known, files) in enumerate(zip(self.progress.keys, self._files, strict=True)):
                files["bin"].flush()
                os.fsync(files["bin"].fileno())
                idx = self._path(key, "idx")
                with idx.open("wb") as index:
                    write_index(
                        cast(BinaryIO, index),
                        self._dtype,
                        (known.sequences, known.documents),
                        files["lengths"],
                        files["marks"],
                    )
                    index.flush()
                    os.fsync(index.fileno())
                finished.append((self._path(key, "bin"), idx))
        return tuple(finished)

    def _path(self, key: int, what: str) -> Path:
        return self.folder / f"assembled.{key}.{what}"

    def _read_progress(self, keys: int) -> Progress:
        path = self.folder / "progress.json"
        if not path.is_file():
            return Progress(0, [KeyProgress() for _ in range(keys)])
        return msgspec.json.decode(path.read_bytes(), type=Progress)

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the data set could not be written in {self.folder}: {error.strerror or error}; "
                "what is done is kept there, and the same command goes on from it."
            ) from error


class Renames(msgspec.Struct):
    """What is left to do when everything is written: files to remove first, then to rename."""

    remove: list[str]
    rename: list[tuple[str, str]]


def publish(folder: Path, renames: Renames) -> None:
    """Bring the finished files into place; may be gone through again after a crash.

    Raises
    ------
    DataError
        A file cannot be renamed.
    """
    try:
        write_whole(folder / "renames.json", msgspec.json.encode(renames))
        # What is not there any more was renamed before the crash, and must stay.
        left = [pair for pair in renames.rename if Path(pair[0]).exists()]
        done = {target for _, target in renames.rename} - {target for _, target in left}
        for name in set(renames.remove) - done:
            Path(name).unlink(missing_ok=True)
        for source, target in left:
            Path(source).replace(target)
        for target_folder in {Path(target).parent for _, target in renames.rename}:
            _sync_folder(target_folder)
    except OSError as error:
        raise DataError(
            f"{error.filename} could not be put into place: {error.strerror or error}."
        ) from error


def unfinished_renames(folder: Path) -> Renames | None:
    """What a run that was killed at the very end left to do."""
    path = folder / "renames.json"
    return msgspec.json.decode(path.read_bytes(), type=Renames) if path.is_file() else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole, and is on disk."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _append(source: Path, target: BinaryIO) -> int:
    """Append a file inside the kernel, where it can; gives the bytes appended."""
    target.flush()
    copied = 0
    with source.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        while copied < size:
            try:
                done = os.copy_file_range(stream.fileno(), target.fileno(), size - copied)
            except OSError:
                done = 0  # some file systems cannot, or only for some pairs of files
            if not done:
                stream.seek(copied)
                while block := stream.read(_COPY_BYTES):
                    target.write(block)
                target.flush()
                break
            copied += done
    target.seek(0, os.SEEK_END)
    return size


def _begin_writeback(file: BinaryIO, offset: int, size: int) -> None:
    """Have the kernel start writing to disk now, so that the end has not all of it to wait for."""
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
    if sync_file_range is not None:
        start_only = 2  # SYNC_FILE_RANGE_WRITE, linux/fs.h
        sync_file_range(file.fileno(), ctypes.c_int64(offset), ctypes.c_int64(size), start_only)


def _blocks(path: Path) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    with path.open("rb") as stream:
        while block := stream.read(4 * _COPY_BYTES):
            yield np.frombuffer(block, "<i4")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
