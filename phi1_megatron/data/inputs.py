"""Find input files, open them, and cut what they hold into blocks of whole lines."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from phi1_megatron.errors import DataError

STDIN = "-"
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
MAX_LINE_BYTES = 64 << 20
"""Longer lines are set aside unread: memory must not depend on the input."""

_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
_FOLDER_SUFFIXES = (
    *(text + packed for text in _TEXT_SUFFIXES for packed in ("", *COMPRESSED_SUFFIXES)),
    PARQUET_SUFFIX,
)
_BLOCK_BYTES = 512 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find_inputs(inputs: Iterable[str | Path]) -> list[str]:
    """Files named by ``inputs``, in order: files as they are, folders and globs sorted by path.

    A folder is searched through and through for JSONL (plain, .gz, .zst, .bz2, .xz) and parquet;
    hidden files are passed over. ``-`` is standard input.

    Raises
    ------
    DataError
        A name matches nothing.
    """
    found: list[str] = []
    for name in map(str, inputs):
        path = Path(name).expanduser()
        if name == STDIN or path.is_file() or path.is_fifo():
            found.append(name if name == STDIN else str(path))
            continue
        if path.is_dir():
            matches = sorted(
                str(file)
                for file in path.rglob("*")
                if file.name.endswith(_FOLDER_SUFFIXES)
                and not file.name.startswith(".")
                and file.is_file()
            )
            what = f"the folder {name} holds no file that ends in .jsonl, .json or .parquet"
        else:
            # Path.glob does not take an absolute pattern.
            named = glob(str(path), recursive=True)  # noqa: PTH207
            matches = sorted(match for match in named if Path(match).is_file())
            what = f"no file, folder or pattern {name}"
        if not matches:
            raise DataError(f"input not found: {what}.")
        found.extend(matches)
    if not found:
        raise DataError("no input was named; give files, folders, patterns or - for stdin.")
    return found


class Readable(Protocol):
    """All that is asked of an open file, or of what reads through one."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        ...


class Lines(NamedTuple):
    """A block of whole lines; the last line of a file may lack its newline."""

    data: bytes
    first: int  # number of its first line, counted from 1
    end: int  # number of the line after its last


class TooLong(NamedTuple):
    """A line that was passed over unread."""

    number: int
    bytes: int


class Damaged(NamedTuple):
    """Where compressed data stops making sense; nothing after it can be read."""

    number: int
    detail: str


def blocks_of_lines(
    stream: Readable,
    max_line_bytes: int = MAX_LINE_BYTES,
    block_bytes: int = _BLOCK_BYTES,
    at_start: bool = True,
) -> Iterator[Lines | TooLong | Damaged]:
    """Cut a stream into blocks of whole lines, holding one block and at most one line at a time.

    ``at_start``: the stream begins where a file does, so a byte-order mark is passed over.
    """
    block_bytes = min(block_bytes, max_line_bytes)  # so that no block hides a longer line
    line, carried, skipped = 1, bytearray(), 0
    damage: Damaged | None = None
    while True:
        try:
            read = stream.read(block_bytes)
        except DamageError as error:
            # What a torn line held before the damage is no line.
            read, carried, damage = b"", bytearray(), Damaged(0, str(error))
        if not read:
            break
        if at_start:
            read, at_start = read.removeprefix(_BYTE_ORDER_MARK), False
        if skipped:
            end = read.find(b"\n") + 1
            skipped += end or len(read)
            if not end:
                continue
            yield TooLong(line, skipped)
            line, skipped, read = line + 1, 0, read[end:]
        cut = read.rfind(b"\n") + 1
        if not cut:
            carried += read
            if len(carried) > max_line_bytes:
                skipped, carried = len(carried), bytearray()
            continue
        head = read.find(b"\n") + 1
        if len(carried) + head > max_line_bytes:
            yield TooLong(line, len(carried) + head)
            line, data = line + 1, read[head:cut]
        else:
            data = b"".join((carried, memoryview(read)[:cut]))
        carried = bytearray(memoryview(read)[cut:])
        if data:
            first, line = line, line + _newlines(data)
            yield Lines(data, first, line)
    if skipped:
        yield TooLong(line, skipped)
        line += 1
    elif carried:
        yield Lines(bytes(carried), line, line + 1)
        line += 1
    if damage is not None:
        yield damage._replace(number=line)


class DamageError(Exception):
    """Compressed data that stops making sense."""


def _newlines(data: bytes) -> int:
    """``data.count`` of a newline, several times as fast."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))


def decompressed(raw: BinaryIO, name: str) -> Readable:
    """The plain bytes of an open file, by the compression that its name ends in.

    Reading raises :class:`DamageError` where the data are damaged, after everything before it.
    """
    if name.endswith(".gz"):
        return _Decompressed(gzip.GzipFile(fileobj=raw).read1)
    if name.endswith(".bz2"):
        return _Decompressed(bz2.BZ2File(raw).read1)
    if name.endswith(".xz"):
        return _Decompressed(lzma.LZMAFile(raw).read1)
    if name.endswith(".zst"):
        library = _optional("zstandard", name)
        reader = library.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return _Decompressed(reader.read1, library.ZstdError)
    return raw


class _Decompressed:
    """Reads as much as asked for, and loses nothing of what lies before damage.

    The libraries' own ``read`` drops what it had gathered when it meets damage.
    """

    def __init__(self, read1: Callable[[int], bytes], *damage: type[Exception]) -> None:
        self._read1 = read1
        self._damage: tuple[type[Exception], ...] = (
            *(EOFError, OSError, zlib.error, lzma.LZMAError),
            *damage,
        )
        self._error: Exception | None = None

    def read(self, size: int = -1, /) -> bytes:
        gathered: list[bytes] = []
        missing = size
        while missing > 0 and self._error is None:
            try:
                part = self._read1(missing)
            except self._damage as error:
                # gzip and bz2 speak of damaged data as an OSError without a number.
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self._error = error
                break
            if not part:
                break
            gathered.append(part)
            missing -= len(part)
        if self._error is not None and not gathered:
            raise DamageError(str(self._error)) from self._error
        return b"".join(gathered)


def open_parquet(name: str) -> Any:  # pyarrow carries no types
    """The file as ``pyarrow.parquet.ParquetFile``.

    Raises
    ------
    DataError
        pyarrow is not installed, or the file is not parquet.
    """
    _optional("pyarrow", name)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(name)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name} is not a parquet file that opens: {error}") from error


def check_columns(name: str, file: Any, keys: Iterable[str]) -> None:
    """Refuse a parquet file that lacks one of the columns."""
    there = file.schema_arrow.names
    absent = [key for key in keys if key not in there]
    if absent:
        raise DataError(f"{name} has no column {absent[0]!r}; its columns are {', '.join(there)}.")


def _optional(module: str, name: str) -> ModuleType:
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} needs the package {module}: pip install 'phi1-megatron[data]'."
        ) from error


def reading_failed(name: str, error: OSError) -> DataError:
    """The one sentence for an input that cannot be read."""
    return DataError(f"{name} could not be read: {error.strerror or error}.")
