"""Read documents out of JSONL (plain or compressed) and parquet, and set the bad rows aside.

A JSONL line is one JSON object; one or more of its string fields are the text. Blank lines and a
byte-order mark are passed over. A row that cannot be used never ends a run: it is counted by its
reason and written to a quarantine file with its place, unless ``strict`` asks to stop at the first.

Memory stays flat: one line, or one parquet row group's batch, at a time.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from glob import glob
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, NamedTuple, cast

import msgspec

from phi1_megatron.errors import DataError

STDIN = "-"

# Reasons a row is set aside; they are keys of reports, so they stay as they are.
BROKEN_JSON = "broken JSON"
MISSING_KEY = "missing key"
WRONG_TYPE = "wrong type"
INVALID_UTF8 = "invalid UTF-8"
EMPTY_TEXT = "empty text"
DAMAGED_FILE = "truncated or damaged compression"

_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSED_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")
_PARQUET_SUFFIX = ".parquet"
_FOLDER_SUFFIXES = (
    *(text + packed for text in _TEXT_SUFFIXES for packed in _COMPRESSED_SUFFIXES),
    _PARQUET_SUFFIX,
)
_PARQUET_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document: its text and where it came from (``line`` counts from 1; parquet: the row)."""

    text: str
    source: str
    line: int


class Row(NamedTuple):
    """One row of input: the text of each asked-for key, in the keys' order, and its place."""

    texts: tuple[str, ...]
    source: str
    line: int


class BadRows(AbstractContextManager["BadRows"]):
    """Counts the rows that cannot be used and writes them to a quarantine JSONL.

    The file holds ``{"input", "line", "reason", "detail"}`` a line. Used as a context manager it
    appears by rename when the block ends well, and not at all when it fails or no row was bad (a
    file left by an earlier run is then removed: it would speak of rows that are fine now).

    Parameters
    ----------
    path
        Where to write; None only counts.
    strict
        Raise :class:`DataError` at the first bad row.
    """

    def __init__(self, path: str | Path | None = None, strict: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self._file: BinaryIO | None = None

    @property
    def total(self) -> int:
        """Rows set aside so far."""
        return sum(self.counts.values())

    def add(self, source: str, line: int, reason: str, detail: str = "") -> None:
        """Set one row aside; in strict mode raise instead."""
        if self.strict:
            told = f" ({detail})" if detail else ""
            raise DataError(
                f"{source}, line {line:,}: {reason}{told}; mend the row, or leave --strict out to "
                "set such rows aside."
            )
        self.counts[reason] += 1
        if self.path is not None:
            row = {"input": source, "line": line, "reason": reason, "detail": detail}
            try:
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self._partial().open("wb")
                self._file.write(msgspec.json.encode(row) + b"\n")
            except OSError as error:
                raise _unwritable(self.path, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.path is None:
            return
        if self._file is None:
            if kind is None:
                self.path.unlink(missing_ok=True)
            return
        try:
            self._file.close()
            if kind is None:
                self._partial().replace(self.path)
        except OSError as failure:
            raise _unwritable(self.path, failure) from failure
        finally:
            self._partial().unlink(missing_ok=True)

    def _partial(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")


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


class RowReader:
    """Streams :class:`Row` objects from any number of inputs.

    Attributes
    ----------
    files
        The inputs as found, in reading order.
    bytes_total
        Their size on disk (0 where standard input hides it).
    """

    def __init__(
        self,
        inputs: Iterable[str | Path],
        json_keys: Sequence[str] = ("text",),
        bad_rows: BadRows | None = None,
    ) -> None:
        self.files = find_inputs(inputs)
        self.json_keys = tuple(json_keys)
        self.bad_rows = BadRows() if bad_rows is None else bad_rows
        self.sizes = {f: 0 if f == STDIN else Path(f).stat().st_size for f in self.files}
        self.bytes_total = 0 if STDIN in self.files else sum(self.sizes[f] for f in self.files)
        self._finished_bytes = 0
        self._position: Callable[[], int] = lambda: 0
        fields = [(f"text_{i}", str) for i in range(len(self.json_keys))]
        rename = {f"text_{i}": key for i, key in enumerate(self.json_keys)}
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Texts", fields, rename=rename))

    @property
    def bytes_done(self) -> int:
        """How much of the inputs has been read; compressed bytes where compressed."""
        return self._finished_bytes + self._position()

    def __iter__(self) -> Iterator[Row]:
        self._finished_bytes = 0
        for name in self.files:
            rows = self._parquet_rows(name) if name.endswith(_PARQUET_SUFFIX) else self._lines(name)
            try:
                yield from rows
            except OSError as error:
                raise DataError(f"{name} could not be read: {error.strerror or error}.") from error
            self._position = lambda: 0
            self._finished_bytes += self.sizes[name]

    def _lines(self, name: str) -> Iterator[Row]:
        piped = name == STDIN
        source, number = "<stdin>" if piped else name, 0
        with nullcontext(sys.stdin.buffer) if piped else Path(name).open("rb") as raw:
            self._position = (lambda: 0) if piped else raw.tell
            try:
                for number, line in enumerate(_decompressed(raw, name), 1):
                    if number == 1:
                        line = line.removeprefix(_BYTE_ORDER_MARK)
                    row = self._parse(line, source, number)
                    if row is not None:
                        yield row
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                # gzip and bz2 speak of damaged data as an OSError without a number.
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self.bad_rows.add(source, number + 1, DAMAGED_FILE, str(error))
            finally:
                self._position = lambda: 0

    def _parse(self, line: bytes, source: str, number: int) -> Row | None:
        try:
            texts = msgspec.structs.astuple(self._decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            if not line.strip():
                return None
            # msgspec is strict where Python's json is not (NaN); the slow look decides, and names
            # the reason.
            outcome = _parse_slowly(line, self.json_keys)
            if isinstance(outcome, _Bad):
                self.bad_rows.add(source, number, *outcome)
                return None
            texts = outcome
        return self._checked(texts, source, number)

    def _checked(self, texts: tuple[str, ...], source: str, number: int) -> Row | None:
        if all(texts):
            return Row(texts, source, number)
        empty = self.json_keys[texts.index("")]
        self.bad_rows.add(source, number, EMPTY_TEXT, f"{empty!r} is empty")
        return None

    def _parquet_rows(self, name: str) -> Iterator[Row]:
        file = _open_parquet(name)
        absent = [key for key in self.json_keys if key not in file.schema_arrow.names]
        if absent:
            raise DataError(
                f"{name} has no column {absent[0]!r}; its columns are "
                f"{', '.join(file.schema_arrow.names)}."
            )
        number, rows, size = 0, max(1, file.metadata.num_rows), self.sizes[name]
        self._position = lambda: size * number // rows
        with file:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(self.json_keys)):
                columns = [batch.column(key) for key in self.json_keys]
                for cells in zip(*columns, strict=True):
                    number += 1
                    row = self._from_cells(cells, name, number)
                    if row is not None:
                        yield row

    def _from_cells(self, cells: Sequence[Any], name: str, number: int) -> Row | None:
        try:
            texts = tuple(cell.as_py() for cell in cells)
        except UnicodeDecodeError as error:
            self.bad_rows.add(name, number, INVALID_UTF8, str(error))
            return None
        for key, text in zip(self.json_keys, texts, strict=True):
            if not isinstance(text, str):
                detail = f"{key!r} is {_type_name(text)}, not a string"
                self.bad_rows.add(name, number, WRONG_TYPE, detail)
                return None
        return self._checked(texts, name, number)


def iterate_documents(
    inputs: Iterable[str | Path], json_key: str = "text", bad_rows: BadRows | None = None
) -> Iterator[Document]:
    """Stream the documents of any number of inputs, in order.

    Parameters
    ----------
    inputs
        Files, folders, patterns, or ``-`` for standard input; see :func:`find_inputs`.
    json_key
        The field (or parquet column) that holds the text.
    bad_rows
        Where rows that cannot be used are counted; by default they are passed over.

    Raises
    ------
    DataError
        An input is missing or unreadable, or a row is bad and ``bad_rows`` is strict.
    """
    for texts, source, line in RowReader(inputs, (json_key,), bad_rows):
        yield Document(texts[0], source, line)


class _Bad(NamedTuple):
    reason: str
    detail: str


def _parse_slowly(line: bytes, json_keys: Sequence[str]) -> tuple[str, ...] | _Bad:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Bad(INVALID_UTF8, str(error))
    except (ValueError, RecursionError) as error:
        return _Bad(BROKEN_JSON, str(error))
    if not isinstance(row, dict):
        return _Bad(WRONG_TYPE, f"the line is {_type_name(row)}, not an object")
    texts = []
    for key in json_keys:
        if key not in row:
            return _Bad(MISSING_KEY, f"no {key!r}")
        text = row[key]
        if not isinstance(text, str):
            return _Bad(WRONG_TYPE, f"{key!r} is {_type_name(text)}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return _Bad(INVALID_UTF8, str(error))
        texts.append(text)
    return tuple(texts)


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "not text")


def _decompressed(raw: BinaryIO, name: str) -> Iterable[bytes]:
    if name.endswith(".gz"):
        return cast(Iterable[bytes], gzip.GzipFile(fileobj=raw))
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw)
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if name.endswith(".zst"):
        return _zstd_lines(raw, name)
    return raw


def _zstd_lines(raw: BinaryIO, name: str) -> Iterator[bytes]:
    zstandard = _optional("zstandard", name)
    # A large buffer: the reader asks Python for every refill.
    reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    try:
        yield from io.BufferedReader(reader, buffer_size=1 << 20)
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error


def _open_parquet(name: str) -> Any:  # pyarrow carries no types
    _optional("pyarrow", name)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(name)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name} is not a parquet file that opens: {error}") from error


def _optional(module: str, name: str) -> ModuleType:
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} needs the package {module}: pip install 'phi1-megatron[data]'."
        ) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"the quarantine file {path} could not be written: {error.strerror or error}.")
