"""Stream the texts of one stretch of input, and keep account of what is passed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phi1_megatron.data.documents import PARQUET_ROWS, why_unread
from phi1_megatron.data.inputs import (
    PARQUET_SUFFIX,
    DamageError,
    Lines,
    Readable,
    blocks_of_lines,
    decompressed,
    open_parquet,
)
from phi1_megatron.data.rows import Bad, RowParser
from phi1_megatron.data.shards import HashingReader, Stretch

_ENCODE_CHARACTERS = 1 << 20


class StretchReader:
    """Streams the texts of one stretch by key, and keeps account of what it passed over."""

    def __init__(self, stretch: Stretch, parser: RowParser, max_line_bytes: int) -> None:
        self._stretch, self._parser, self._max_line_bytes = stretch, parser, max_line_bytes
        self.bad: list[tuple[int, Bad]] = []
        self.lines = 0
        self.digest = ""

    def __iter__(self) -> Iterator[tuple[list[str], ...]]:
        stretch = self._stretch
        with stretch.file.open("rb") as raw:
            hashing = HashingReader(raw, stretch.start, stretch.end)
            if stretch.source.endswith(PARQUET_SUFFIX) and not stretch.path:
                yield from self._row_groups()
            elif stretch.path:
                yield from self._lines(_Torn(hashing, stretch.damage))
            else:
                yield from self._lines(decompressed(hashing, stretch.source))  # type: ignore[arg-type]
            self.digest = hashing.digest()

    def _lines(self, stream: Readable) -> Iterator[tuple[list[str], ...]]:
        stretch = self._stretch
        at_start = stretch.start == 0
        for block in blocks_of_lines(stream, self._max_line_bytes, at_start=at_start):
            if not isinstance(block, Lines):
                self.bad.append((block.number, why_unread(block)))
                self.lines = block.number
                continue
            self.lines = block.end - 1
            yield self._parser.lines(block.data) or self._one_by_one(block)

    def _one_by_one(self, block: Lines) -> tuple[list[str], ...]:
        columns: tuple[list[str], ...] = tuple([] for _ in self._parser.json_keys)
        for number, line in enumerate(block.data.split(b"\n"), block.first):
            self._take(self._parser.line(line), number, columns)
        return columns

    def _row_groups(self) -> Iterator[tuple[list[str], ...]]:
        stretch, keys = self._stretch, self._parser.json_keys
        groups = list(range(stretch.first_group, stretch.first_group + stretch.groups))
        with open_parquet(stretch.source) as file:
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=list(keys)):
                columns: tuple[list[str], ...] = tuple([] for _ in keys)
                for cells in zip(*(batch.column(key) for key in keys), strict=True):
                    self.lines += 1
                    self._take(self._parser.cells(cells), self.lines, columns)
                yield columns

    def _take(
        self, outcome: tuple[str, ...] | Bad | None, number: int, columns: Sequence[list[str]]
    ) -> None:
        if isinstance(outcome, Bad):
            self.bad.append((number, outcome))
        elif outcome is not None:
            for column, text in zip(columns, outcome, strict=True):
                column.append(text)


class _Torn:
    """A stream that ends in damage, if there was any."""

    def __init__(self, stream: Readable, damage: str) -> None:
        self._stream, self._damage = stream, damage

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        if not data and self._damage:
            raise DamageError(self._damage)
        return data


def batches(
    blocks: StretchReader,
) -> Iterator[tuple[list[str], ...]]:
    """Blocks cut where documents are so large that encoding them together would take memory."""
    for columns in blocks:
        total = sum(map(len, columns[0]))
        if total <= _ENCODE_CHARACTERS:
            if columns[0]:
                yield columns
            continue
        first = size = 0
        for i, text in enumerate(columns[0]):
            size += len(text)
            if size >= _ENCODE_CHARACTERS or i + 1 == len(columns[0]):
                yield tuple(column[first : i + 1] for column in columns)
                first, size = i + 1, 0
