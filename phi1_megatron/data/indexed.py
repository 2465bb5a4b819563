r"""megatron-core's indexed datasets: ``PREFIX.bin`` (token ids), ``PREFIX.idx`` (where they are).

The format is the one megatron-core reads and writes (``megatron/core/datasets/indexed_dataset.py``,
0.16); this is an own implementation that needs only numpy. ``.bin`` is the ids of all sequences,
one after the other. ``.idx``, little-endian::

    9 bytes           b"MMIDIDX\x00\x00"
    uint64            version, 1
    uint8             dtype code (8 = uint16, 4 = int32 ...)
    uint64            S, number of sequences
    uint64            D, number of documents + 1
    int32[S]          tokens in each sequence
    int64[S]          byte offset of each sequence in .bin
    int64[D]          0, then for each document the number of sequences up to its end

A document is usually one sequence (several where it was split into sentences).
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from phi1_megatron.errors import DataError, UsageError

_DTYPE_NAMES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(_DTYPE_NAMES, 1)
}
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # items or bytes held at a time when streaming

IntArray = npt.NDArray[np.integer[Any]]


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65,500, else int32: megatron-core's own choice."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """A checked index; the arrays are memory maps.

    Attributes
    ----------
    sequence_lengths
        int32 [num_sequences], tokens.
    sequence_pointers
        int64 [num_sequences], byte offsets in the .bin.
    document_indices
        int64 [num_documents + 1], sequences up to each document's end.
    """

    prefix: Path
    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int
    num_tokens: int
    sequence_lengths: npt.NDArray[np.int32]
    sequence_pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    @property
    def bin_path(self) -> Path:
        """The file of token ids."""
        return _with(self.prefix, ".bin")

    @property
    def idx_path(self) -> Path:
        """The file of lengths and offsets."""
        return _with(self.prefix, ".idx")


def read_index(prefix: str | Path) -> IndexInfo:
    """Open ``prefix.idx`` and check it against itself and against the size of ``prefix.bin``.

    Raises
    ------
    DataError
        A file is missing, truncated, longer than described, or not of this format.
    """
    prefix = Path(prefix)
    idx, data = _with(prefix, ".idx"), _with(prefix, ".bin")
    for file in (idx, data):
        if not file.is_file():
            raise DataError(
                f"{file} does not exist; a data set is named by what comes before .bin and .idx."
            )
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise DataError(f"{idx} ({size:,} bytes) is no megatron-core index: its head is wrong.")
    _, version, code, num_sequences, num_documents_1 = _HEADER.unpack(head)
    if version != _VERSION or code not in DTYPE_CODES or num_documents_1 < 1:
        raise DataError(
            f"{idx} has version {version}, dtype code {code} and {num_documents_1} document marks; "
            f"this reads version {_VERSION}, codes 1 to {len(DTYPE_CODES)}, and at least one mark."
        )
    described = _HEADER.size + 12 * num_sequences + 8 * num_documents_1
    # Multimodal data sets carry one more byte a sequence, its mode, which is not used here.
    if size not in (described, described + num_sequences):
        raise DataError(
            f"{idx} holds {size:,} bytes, but its head describes {num_sequences:,} sequences and "
            f"{num_documents_1 - 1:,} documents = {described:,} bytes; {_TORN}"
        )
    dtype = DTYPE_CODES[code]
    offsets = (_HEADER.size, _HEADER.size + 4 * num_sequences, _HEADER.size + 12 * num_sequences)
    lengths = _map(idx, np.dtype("<i4"), offsets[0], num_sequences)
    num_tokens = int(lengths.sum(dtype=np.int64))
    expected, actual = num_tokens * dtype.itemsize, data.stat().st_size
    if actual != expected:
        raise DataError(
            f"{data} holds {actual:,} bytes, but {idx.name} describes {num_tokens:,} tokens of "
            f"{dtype.itemsize} bytes = {expected:,} bytes; {_TORN}"
        )
    return IndexInfo(
        prefix=prefix,
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=num_documents_1 - 1,
        num_tokens=num_tokens,
        sequence_lengths=lengths,
        sequence_pointers=_map(idx, np.dtype("<i8"), offsets[1], num_sequences),
        document_indices=_map(idx, np.dtype("<i8"), offsets[2], num_documents_1),
    )


_TORN = "the copy was cut off or the files do not belong together: copy or preprocess them again."


class TokenReader:
    """The token ids of a data set, by document, without loading it: views into a memory map."""

    def __init__(self, prefix: str | Path) -> None:
        self.index = read_index(prefix)
        self.tokens: npt.NDArray[Any] = _map(
            self.index.bin_path, self.index.dtype, 0, self.index.num_tokens
        )

    def __len__(self) -> int:
        return self.index.num_documents

    def document(self, number: int) -> npt.NDArray[Any]:
        """Ids of document ``number``, all its sequences joined, [tokens]."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        first, end = self.index.document_indices[number : number + 2].tolist()
        start = self._token_offset(first)
        return self.tokens[start : self._token_offset(end)]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self.document(number) for number in range(len(self)))

    def _token_offset(self, sequence: int) -> int:
        if sequence == self.index.num_sequences:
            return self.index.num_tokens
        return int(self.index.sequence_pointers[sequence]) // self.index.dtype.itemsize


class IndexedDatasetWriter(AbstractContextManager["IndexedDatasetWriter"]):
    """Writes ``prefix.bin`` and ``prefix.idx``; they appear by rename when the block ends well.

    Everything is written to files beside the final ones whose names end in ``.partial``; a failure
    removes these and leaves a data set of the same name as it was. Memory does not grow with the
    data set: lengths are kept in a file too until the index is written.

    Raises
    ------
    DataError
        The folder cannot be written, or an id does not fit ``dtype``.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES.values() or self.dtype.kind == "f":
            raise UsageError(f"token ids cannot be stored as {self.dtype}; use uint16 or int32.")
        self.num_documents = self.num_sequences = self.num_tokens = 0
        self._files: dict[str, BinaryIO] = {}
        self._finished = False
        try:
            with _one_sentence(self.prefix):
                self.prefix.parent.mkdir(parents=True, exist_ok=True)
                for part in ("bin", "lengths", "documents", "idx"):
                    self._files[part] = cast(BinaryIO, self._partial(part).open("w+b"))
        except DataError:
            self.discard()
            raise
        self._files["documents"].write(bytes(8))  # document 0 begins at sequence 0

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Add one document: its ids, and the tokens of each of its sequences.

        Without ``lengths`` it is one sequence, or none where it is empty.
        """
        ids = np.asarray(tokens if np.size(tokens) else np.empty(0, self.dtype))
        if lengths is None:
            lengths = [ids.size] if ids.size else []
        if sum(lengths) != ids.size:
            raise ValueError(f"the lengths add up to {sum(lengths)}, not to {ids.size} tokens")
        self._write(ids, np.asarray(lengths, np.int64), np.asarray([len(lengths)]))

    def add_documents(self, tokens: IntArray, lengths: IntArray) -> None:
        """Add many documents of one sequence each: their ids joined, and each one's length."""
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"the lengths add up to {lengths.sum()}, not to {tokens.size} tokens")
        self._write(tokens, lengths, np.ones(lengths.size, np.int64))

    def add_dataset(self, source: IndexInfo, on_bytes: Callable[[int], None] | None = None) -> None:
        """Append a whole data set of the same dtype, streaming it, index and ids."""
        assert source.dtype == self.dtype, (source.dtype, self.dtype)
        with _one_sentence(self.prefix):
            for chunk in _chunks(source.sequence_lengths):
                self._files["lengths"].write(chunk.tobytes())
            for chunk in _chunks(source.document_indices[1:]):
                self._files["documents"].write((chunk + self.num_sequences).tobytes())
            with source.bin_path.open("rb") as stream:
                while block := stream.read(_CHUNK):
                    self._files["bin"].write(block)
                    if on_bytes is not None:
                        on_bytes(len(block))
        self.num_sequences += source.num_sequences
        self.num_documents += source.num_documents
        self.num_tokens += source.num_tokens

    def finish(self) -> None:
        """Write the index and bring everything to disk, still under the partial names.

        Leaving the block does this; doing it before lets several writers fail together.
        """
        if self._finished:
            return
        with _one_sentence(self.prefix):
            files = self._files
            write_index(
                files["idx"],
                self.dtype,
                (self.num_sequences, self.num_documents),
                files["lengths"],
                files["documents"],
            )
            for part in ("bin", "idx"):
                self._files[part].flush()
                os.fsync(self._files[part].fileno())
        self._finished = True

    def publish(self) -> None:
        """Rename the finished files into place.

        The index goes first out and last in: a crash on the way leaves none, not a wrong one.
        """
        with _one_sentence(self.prefix):
            _with(self.prefix, ".idx").unlink(missing_ok=True)
            for part in ("bin", "idx"):
                self._partial(part).replace(_with(self.prefix, f".{part}"))
            folder = os.open(self.prefix.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Close and remove whatever lies under a partial name; safe to call at any time."""
        for part, file in self._files.items():
            with suppress(OSError):  # a full disk fails the flush in close() too
                file.close()
            self._partial(part).unlink(missing_ok=True)
        self._files.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
                self.publish()
        finally:
            self.discard()

    def _write(self, ids: npt.NDArray[Any], lengths: IntArray, sequences: IntArray) -> None:
        """``sequences``: for each document how many of ``lengths`` are its own."""
        if ids.dtype != self.dtype and ids.size:
            self._check_range(int(ids.min()), int(ids.max()))
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(f"a sequence of {lengths.max():,} tokens does not fit int32; split it.")
        marks = self.num_sequences + np.cumsum(sequences, dtype=np.int64)
        with _one_sentence(self.prefix):
            self._files["bin"].write(ids.astype(self.dtype, copy=False).tobytes())
            self._files["lengths"].write(lengths.astype("<i4").tobytes())
            self._files["documents"].write(marks.astype("<i8").tobytes())
        self.num_tokens += ids.size
        self.num_sequences += lengths.size
        self.num_documents += sequences.size

    def _check_range(self, least: int, most: int) -> None:
        limits = np.iinfo(self.dtype)
        if least < limits.min or most > limits.max:
            raise DataError(
                f"token ids from {least} to {most} do not fit {self.dtype} ({limits.min} to "
                f"{limits.max}); write {self.prefix} with a larger dtype."
            )

    def _partial(self, part: str) -> Path:
        return _with(self.prefix, f".{part}.{os.getpid()}.partial")


def write_index(
    out: BinaryIO,
    dtype: np.dtype[Any],
    counts: tuple[int, int],
    lengths: BinaryIO,
    marks: BinaryIO,
) -> None:
    """Write an .idx from what was streamed while the .bin grew.

    Parameters
    ----------
    counts
        Sequences, documents.
    lengths
        int32, tokens of each sequence.
    marks
        int64, 0 and then for each document the sequences up to its end.
    """
    num_sequences, num_documents = counts
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    out.write(_HEADER.pack(_MAGIC, _VERSION, code, num_sequences, num_documents + 1))
    lengths.seek(0)
    shutil.copyfileobj(lengths, out)
    lengths.seek(0)
    pointer = 0
    while block := lengths.read(4 * _CHUNK):
        ends = pointer + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * dtype.itemsize
        out.write(np.concatenate(([pointer], ends[:-1])).astype("<i8").tobytes())
        pointer = int(ends[-1])
    marks.seek(0)
    shutil.copyfileobj(marks, out)


def merge(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexInfo:
    """Join data sets in the order given; memory does not grow with them.

    Parameters
    ----------
    on_progress
        Called with (bytes of .bin copied, bytes in all).

    Raises
    ------
    DataError
        An input is damaged, or their dtypes differ.
    UsageError
        No input, or the output is one of the inputs.
    """
    if not prefixes:
        raise UsageError("nothing to merge: name at least one data set.")
    output = Path(output_prefix)
    if output.absolute() in {Path(prefix).absolute() for prefix in prefixes}:
        raise UsageError(f"{output} is both an input and the output; choose another output.")
    sources = [read_index(prefix) for prefix in prefixes]
    for source in sources:
        if source.dtype != sources[0].dtype:
            raise DataError(
                f"{source.prefix} holds {source.dtype} and {sources[0].prefix} {sources[0].dtype}; "
                "only data sets of one dtype (one vocabulary) can be merged."
            )
    total = sum(source.num_tokens * source.dtype.itemsize for source in sources)
    done = 0

    def count(copied: int) -> None:
        nonlocal done
        done += copied
        if on_progress is not None:
            on_progress(done, total)

    with IndexedDatasetWriter(output, sources[0].dtype) as writer:
        for source in sources:
            writer.add_dataset(source, count)
    return read_index(output)


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def _chunks(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK))


@contextmanager
def _one_sentence(prefix: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data set {prefix} could not be written: {error.strerror or error}."
        ) from error
