"""Read documents out of JSONL (plain or compressed) and parquet, and set the bad rows aside.

A JSONL line is one JSON object; one or more of its string fields are the text. Blank lines and a
byte-order mark are passed over. A row that cannot be used never ends a run: it is counted by its
reason and written to a quarantine file with its place, unless ``strict`` asks to stop at the first.

Memory stays flat: one block of lines, or one parquet row group's batch, at a time.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import msgspec

from phi1_megatron.data.inputs import (
    PARQUET_SUFFIX,
    STDIN,
    Damaged,
    Lines,
    TooLong,
    blocks_of_lines,
    check_columns,
    decompressed,
    find_inputs,
    open_parquet,
    reading_failed,
)
from phi1_megatron.data.rows import DAMAGED_FILE, TOO_LONG, Bad, RowParser
from phi1_megatron.errors import DataError

PARQUET_ROWS = 256
"""Rows of a table held at a time."""


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
        self._parser = RowParser(self.json_keys)

    @property
    def bytes_done(self) -> int:
        """How much of the inputs has been read; compressed bytes where compressed."""
        return self._finished_bytes + self._position()

    def __iter__(self) -> Iterator[Row]:
        self._finished_bytes = 0
        for name in self.files:
            rows = self._parquet_rows(name) if name.endswith(PARQUET_SUFFIX) else self._lines(name)
            try:
                yield from rows
            except OSError as error:
                raise reading_failed(name, error) from error
            self._position = lambda: 0
            self._finished_bytes += self.sizes[name]

    def _lines(self, name: str) -> Iterator[Row]:
        piped = name == STDIN
        source = "<stdin>" if piped else name
        with nullcontext(sys.stdin.buffer) if piped else Path(name).open("rb") as raw:
            self._position = (lambda: 0) if piped else raw.tell
            try:
                for block in blocks_of_lines(decompressed(raw, name)):
                    if isinstance(block, Lines):
                        for number, line in enumerate(block.data.split(b"\n"), block.first):
                            row = self._kept(self._parser.line(line), source, number)
                            if row is not None:
                                yield row
                    else:
                        self.bad_rows.add(source, block.number, *why_unread(block))
            finally:
                self._position = lambda: 0

    def _kept(self, outcome: tuple[str, ...] | Bad | None, source: str, number: int) -> Row | None:
        """The row to hand out; a bad one is set aside, a blank line passed over."""
        if isinstance(outcome, Bad):
            self.bad_rows.add(source, number, *outcome)
            return None
        return None if outcome is None else Row(outcome, source, number)

    def _parquet_rows(self, name: str) -> Iterator[Row]:
        file = open_parquet(name)
        check_columns(name, file, self.json_keys)
        number, rows, size = 0, max(1, file.metadata.num_rows), self.sizes[name]
        self._position = lambda: size * number // rows
        with file:
            for batch in file.iter_batches(PARQUET_ROWS, columns=list(self.json_keys)):
                columns = [batch.column(key) for key in self.json_keys]
                for cells in zip(*columns, strict=True):
                    number += 1
                    row = self._kept(self._parser.cells(cells), name, number)
                    if row is not None:
                        yield row


def why_unread(place: TooLong | Damaged) -> Bad:
    """The reason and detail of lines that were never parsed."""
    if isinstance(place, Damaged):
        return Bad(DAMAGED_FILE, place.detail)
    return Bad(TOO_LONG, f"{place.bytes:,} bytes")


def iterate_documents(
    inputs: Iterable[str | Path], json_key: str = "text", bad_rows: BadRows | None = None
) -> Iterator[Document]:
    """Stream the documents of any number of inputs, in order.

    Parameters
    ----------
    inputs
        Files, folders, patterns, or ``-`` for standard input; see ``inputs.find_inputs``.
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


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"the quarantine file {path} could not be written: {error.strerror or error}.")
