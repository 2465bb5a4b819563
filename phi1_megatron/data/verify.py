"""Read an indexed data set through and through, and name the first thing found wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from phi1_megatron.data.indexed import IndexInfo, read_index
from phi1_megatron.data.report import Chunk, DatasetReport, file_hash, report_path
from phi1_megatron.errors import DataError

_CHUNK = 1 << 20  # sequences or tokens held at a time

OnProgress = Callable[[int, int], None]
"""Called with (bytes of the .bin read, bytes in all)."""


def verify(
    prefix: str | Path,
    vocab_size: int | None = None,
    report: DatasetReport | None = None,
    on_progress: OnProgress | None = None,
) -> IndexInfo:
    """Read a data set through: pointers, document marks, every id and every checksum.

    Memory does not grow with the data set.

    Parameters
    ----------
    vocab_size
        Ids must lie below it; None leaves them unchecked.
    report
        The data set's own, whose counts and checksums must be those of the files.

    Raises
    ------
    DataError
        The first thing found wrong, with its place.
    """
    index = read_index(prefix)
    if report is not None:
        _check_report(index, report)
    _check_structure(index)
    chunks = report.chunks if report is not None else ()
    if vocab_size is not None or chunks:
        _check_tokens(index, vocab_size, chunks, on_progress)
    return index


def _check_report(index: IndexInfo, report: DatasetReport) -> None:
    """Counts, the sum of the chunks, and the .idx itself."""
    if (report.documents, report.tokens) != (index.num_documents, index.num_tokens):
        raise DataError(
            f"{index.prefix} holds {index.num_documents:,} documents and {index.num_tokens:,} "
            f"tokens, but its report speaks of {report.documents:,} and {report.tokens:,}; "
            "preprocess it again."
        )
    described, size = sum(chunk.bytes for chunk in report.chunks), _size(index)
    if report.chunks and described != size:
        raise DataError(
            f"{report_path(index.prefix)} has checksums of {len(report.chunks):,} chunks that add "
            f"up to {described:,} bytes, but {index.bin_path} holds {size:,}: the files do not "
            "belong together; copy or preprocess them again."
        )
    if report.idx_xxh3_128 is not None:
        found = file_hash(index.idx_path)
        if found != report.idx_xxh3_128:
            raise DataError(
                f"{index.idx_path} has checksum {found}, but the report says "
                f"{report.idx_xxh3_128}: {_CHANGED}"
            )


_CHANGED = (
    "it was changed or damaged after it was written; copy it again from a sound one, or "
    "preprocess again."
)


def _check_structure(index: IndexInfo) -> None:
    itemsize, pointer = index.dtype.itemsize, 0
    for start in range(0, index.num_sequences, _CHUNK):
        lengths = index.sequence_lengths[start : start + _CHUNK].astype(np.int64)
        ends = pointer + np.cumsum(lengths) * itemsize
        begins = np.concatenate(([pointer], ends[:-1]))
        wrong = (lengths < 0) | (begins != index.sequence_pointers[start : start + _CHUNK])
        if wrong.any():
            raise DataError(
                f"{index.idx_path}: sequence {start + int(wrong.argmax()):,} does not begin where "
                "the one before it ends; preprocess the data set again."
            )
        pointer = int(ends[-1])
    marks, last = index.document_indices, 0
    sound = int(marks[0]) == 0
    for start in range(0, len(marks), _CHUNK):
        part = marks[start : start + _CHUNK]
        sound = sound and int(part[0]) >= last and not (np.diff(part) < 0).any()
        last = int(part[-1])
    if not sound or last != index.num_sequences:
        raise DataError(
            f"{index.idx_path}: the document marks do not rise from 0 to {index.num_sequences:,} "
            "sequences; preprocess the data set again."
        )


def _check_tokens(
    index: IndexInfo,
    vocab_size: int | None,
    chunks: Sequence[Chunk],
    on_progress: OnProgress | None,
) -> None:
    """Ids and checksums in one pass over the .bin.

    An id outside the vocabulary waits for its chunk's checksum, which tells damage from another
    tokenizer.
    """
    digests = _Digests(index, chunks)
    wrong_id: DataError | None = None
    done, size = 0, _size(index)
    for block in _blocks(index):
        if vocab_size is not None and wrong_id is None:
            wrong_id = _wrong_id(index, block, done, vocab_size)
        digests.update(block)
        done += len(block)
        if wrong_id is not None and digests.settled:
            raise wrong_id
        if on_progress is not None:
            on_progress(done, size)
    if wrong_id is not None:
        raise wrong_id


def _blocks(index: IndexInfo) -> Iterator[bytes]:
    """The .bin, so many whole ids at a time; read, since a failing disk kills a memory map."""
    try:
        with index.bin_path.open("rb") as stream:
            while block := stream.read(_CHUNK * index.dtype.itemsize):
                yield block
    except OSError as error:
        raise DataError(
            f"{index.bin_path} could not be read: {error.strerror or error}."
        ) from error


def _wrong_id(index: IndexInfo, block: bytes, offset: int, vocab_size: int) -> DataError | None:
    ids: np.ndarray[Any, Any] = np.frombuffer(block, index.dtype)
    if ids.min() >= 0 and ids.max() < vocab_size:
        return None
    at = int(((ids < 0) | (ids >= vocab_size)).argmax())
    return DataError(
        f"{index.bin_path}: token {offset // index.dtype.itemsize + at:,} is id {ids[at]}, outside "
        f"the vocabulary of {vocab_size:,}; it was written with another tokenizer or is damaged."
    )


class _Digests:
    """Compares a .bin with its chunks' checksums as it is read."""

    def __init__(self, index: IndexInfo, chunks: Sequence[Chunk]) -> None:
        self._index, self._chunks = index, chunks
        self._number = self._begin = self._done = 0
        self._digest = xxhash.xxh3_128()

    @property
    def settled(self) -> bool:
        """Whether all that was read so far lies in chunks whose checksum is known to be right."""
        return self._done == 0

    def update(self, block: bytes) -> None:
        rest = memoryview(block)
        while self._number < len(self._chunks):
            chunk = self._chunks[self._number]
            part = rest[: chunk.bytes - self._done]
            self._digest.update(part)
            self._done += len(part)
            rest = rest[len(part) :]
            if self._done < chunk.bytes:
                return
            self._finish(chunk)

    def _finish(self, chunk: Chunk) -> None:
        found = self._digest.hexdigest()
        if found != chunk.xxh3_128:
            raise DataError(
                f"{self._index.bin_path}: chunk {self._number + 1:,} of {len(self._chunks):,}, "
                f"bytes {self._begin:,} to {self._begin + chunk.bytes - 1:,}, has checksum "
                f"{found}, but the report says {chunk.xxh3_128}: {_CHANGED}"
            )
        self._number += 1
        self._begin += chunk.bytes
        self._done = 0
        self._digest.reset()


def _size(index: IndexInfo) -> int:
    return index.num_tokens * index.dtype.itemsize
