"""Cut the inputs into shards: what one worker reads, encodes and writes at a time.

Plain JSONL is cut at newlines, parquet at row groups; small files share a shard. A compressed file
cannot be entered in the middle: it is one shard, unless it is so large that other workers would
wait for it; then, like standard input, it is read by the parent, which hands out pieces of it.

A plan depends on the inputs and on how many workers there are when it is made; a resumed run keeps
the plan it was started with, and what is written does not depend on it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash

from phi1_megatron.data.inputs import (
    COMPRESSED_SUFFIXES,
    PARQUET_SUFFIX,
    STDIN,
    DamageError,
    Readable,
    check_columns,
    decompressed,
    open_parquet,
    reading_failed,
)

_SMALLEST, _LARGEST = 1 << 20, 256 << 20
_SHARDS_A_WORKER = 16
_PIECE_BYTES = 64 << 20
_STREAMED_FROM = 16 << 20
_SEEK_BYTES = 1 << 16
_READ_BYTES = 1 << 20


class Stretch(msgspec.Struct, frozen=True, array_like=True):
    """Part of one input: bytes of a plain file, row groups of a parquet file, or a whole file.

    ``start`` and ``end`` are bytes (of the packed file where it is packed). ``first_group`` and
    ``groups`` are for parquet. ``path`` is where the bytes are, where that is not the input itself.
    """

    source: str
    start: int
    end: int
    first_group: int = 0
    groups: int = 0
    path: str = ""
    damage: str = ""

    @property
    def file(self) -> Path:
        """Where to read."""
        return Path(self.path or self.source)


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """What one worker does at a time. ``bytes_done``: input read when it and all before it are."""

    number: int
    stretches: tuple[Stretch, ...]
    bytes_done: int


class Planned(msgspec.Struct, frozen=True, array_like=True):
    """A shard's stretches, known beforehand; or, with ``streamed``, one input to read in pieces."""

    stretches: tuple[Stretch, ...]
    streamed: bool = False


def plan(
    sizes: dict[str, int],
    files: Sequence[str],
    json_keys: Sequence[str],
    workers: int,
    shard_bytes: int | None = None,
) -> tuple[Planned, ...]:
    """Cut ``files``, whose ``sizes`` are in bytes, into shards of about ``shard_bytes``.

    Raises
    ------
    DataError
        A file cannot be read, or a parquet file lacks a column.
    """
    total = sum(sizes[name] for name in files)
    target = shard_bytes or min(max(total // (_SHARDS_A_WORKER * workers), _SMALLEST), _LARGEST)
    planned: list[Planned] = []
    together: list[Stretch] = []
    for name in files:
        size = sizes[name]
        too_large = max(_STREAMED_FROM, total // (4 * workers))
        streamed = name == STDIN or (name.endswith(COMPRESSED_SUFFIXES) and size > too_large)
        # The first two are small, so that what is wrong with a run shows at once.
        small = () if planned or together else (_SMALLEST, 2 * _SMALLEST)
        stretches = [] if streamed else _stretches(name, size, target, json_keys, small)
        if len(stretches) == 1 and size < target:
            if together and sum(_length(s) for s in together) + size > target:
                planned.append(Planned(tuple(together)))
                together = []
            together += stretches
            continue
        if together:
            planned.append(Planned(tuple(together)))
            together = []
        if streamed:
            planned.append(Planned((Stretch(name, 0, size),), streamed=True))
        planned += [Planned((stretch,)) for stretch in stretches]
    if together:
        planned.append(Planned(tuple(together)))
    return tuple(planned)


def shards(planned: Sequence[Planned], folder: Path) -> Iterator[Shard]:
    """The shards of a plan, in order; pieces of streamed inputs are written to ``folder``.

    Whoever is done with a shard removes its pieces (:func:`drop_pieces`).

    Raises
    ------
    DataError
        A streamed input cannot be read.
    """
    number = done = 0
    for item in planned:
        if not item.streamed:
            done += sum(_length(stretch) for stretch in item.stretches)
            yield Shard(number, item.stretches, done)
            number += 1
            continue
        source = item.stretches[0].source
        for piece, position in _pieces(source, folder, number):
            yield Shard(number, (piece,), done + position)
            number += 1
        done += item.stretches[0].end


def drop_pieces(shard: Shard) -> None:
    """Remove what a shard was read from, where that was a piece written for it."""
    for stretch in shard.stretches:
        if stretch.path:
            stretch.file.unlink(missing_ok=True)


class HashingReader:
    """Reads ``[start, end)`` of a file and hashes every byte of it, read on purpose or at the end.

    The decompressors ask only for what they need; :meth:`digest` reads on to the end.
    """

    def __init__(self, raw: BinaryIO, start: int, end: int) -> None:
        self._raw = raw
        self._left = end - start
        self._hash = xxhash.xxh3_128()
        raw.seek(start)

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, and none beyond the end of the stretch."""
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        data = self._raw.read(wanted) if wanted else b""
        self._left -= len(data)
        self._hash.update(data)
        return data

    def tell(self) -> int:
        """Bytes left, counted down; decompressors only ask whether this changes."""
        return -self._left

    def digest(self) -> str:
        """XXH3-128 of the whole stretch, as hexadecimal digits."""
        while self.read(_READ_BYTES):
            pass
        return self._hash.hexdigest()


def hash_stretch(stretch: Stretch) -> str:
    """XXH3-128 of the bytes that a stretch is read from."""
    with stretch.file.open("rb") as raw:
        return HashingReader(raw, stretch.start, stretch.end).digest()


def _length(stretch: Stretch) -> int:
    return stretch.end - stretch.start


def _stretches(
    name: str, size: int, target: int, json_keys: Sequence[str], small: tuple[int, ...]
) -> list[Stretch]:
    try:
        if name.endswith(PARQUET_SUFFIX):
            return _row_groups(name, size, target, json_keys)
        if name.endswith(COMPRESSED_SUFFIXES) or size <= target:
            return [Stretch(name, 0, size)]
        with Path(name).open("rb") as raw:
            cuts = [0]
            for wanted in sorted((*small, *range(target, size, target))):
                if wanted > cuts[-1]:
                    cuts.append(_after_newline(raw, wanted, size))
    except OSError as error:
        raise reading_failed(name, error) from error
    cuts = [cut for cut in cuts if cut < size] + [size]
    return [Stretch(name, a, b) for a, b in itertools.pairwise(cuts)]


def _after_newline(raw: BinaryIO, position: int, size: int) -> int:
    raw.seek(position)
    while block := raw.read(_SEEK_BYTES):
        end = block.find(b"\n") + 1
        if end:
            return raw.tell() - len(block) + end
    return size


def _row_groups(name: str, size: int, target: int, json_keys: Sequence[str]) -> list[Stretch]:
    """Row groups, gathered to about ``target`` bytes. A stretch's bytes run up to the next one's,
    so that together they are the file, its head and foot included."""
    with open_parquet(name) as file:
        check_columns(name, file, json_keys)
        starts = [_group_start(file.metadata.row_group(i)) for i in range(file.num_row_groups)]
    if not starts:
        return [Stretch(name, 0, size)]
    firsts = [0]
    for group, start in enumerate(starts):
        if start - starts[firsts[-1]] >= target:
            firsts.append(group)
    edges = [0, *(starts[first] for first in firsts[1:]), size]
    ends = [*firsts[1:], len(starts)]
    return [
        Stretch(name, edges[i], edges[i + 1], first, end - first)
        for i, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]


def _group_start(group: Any) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    starts = ((c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns)
    return int(min(min(pair) for pair in starts))


def _pieces(source: str, folder: Path, number: int) -> Iterator[tuple[Stretch, int]]:
    """Pieces of whole lines of a stream, each in a file of its own, and how far that was read."""
    with contextlib.ExitStack() as stack:
        try:
            if source == STDIN:
                raw = sys.stdin.buffer
                stream: Readable = raw
                position: Callable[[], int] = lambda: 0  # noqa: E731
            else:
                raw = stack.enter_context(Path(source).open("rb"))
                stream, position = decompressed(raw, source), raw.tell
            name = "<stdin>" if source == STDIN else source
            carried, damage, block = b"", "", b" "
            while block:
                path = folder / f"piece-{number:06d}"
                with path.open("wb") as out:
                    written, carried = out.write(carried), b""
                    while not carried and block:
                        try:
                            block = stream.read(_READ_BYTES)
                        except DamageError as error:
                            block, damage = b"", str(error) or "damaged"
                        full = written + len(block) >= _PIECE_BYTES
                        cut = block.rfind(b"\n") + 1 if full else 0
                        written += out.write(block[: cut or len(block)])
                        if cut:
                            carried = block[cut:]
                            break
                if not written and not damage:
                    path.unlink()
                    return
                yield Stretch(name, 0, written, path=str(path), damage=damage), position()
                number += 1
        except OSError as error:
            raise reading_failed(source, error) from error
