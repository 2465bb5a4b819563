"""A worker's job: read one shard, encode it, and write its parts beside each other.

A shard becomes, for each key, ``shard-N.KEY.bin`` (ids), ``.lengths`` (int32, tokens of each
sequence) and ``.sequences`` (int32, sequences of each document); then its record,
``shard-N.record``, whose appearance by rename says that the parts are whole.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.engine import Encoded, Engine, EngineChoice, open_engine
from phi1_megatron.data.indexed import best_dtype
from phi1_megatron.data.inputs import reading_failed
from phi1_megatron.data.report import file_hash
from phi1_megatron.data.rows import Bad, RowParser
from phi1_megatron.data.shard_reader import StretchReader, batches
from phi1_megatron.data.shards import HashingReader, Shard, Stretch, hash_stretch
from phi1_megatron.errors import DataError

if TYPE_CHECKING:
    from phi1_megatron.data.sentences import SentenceSplitter

_SAMPLE_CHARACTERS = 2048
_SAMPLES = 8
_HUGE_CHARACTERS = 1 << 20


class KeyRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a shard gave for one key. ``xxh3_128`` is the .bin part's."""

    tokens: int
    sequences: int
    text_bytes: int
    literal_eods: int
    xxh3_128: str
    bytes: int


class StretchRecord(msgspec.Struct, frozen=True, array_like=True):
    """What was read of one stretch: XXH3-128 of its bytes, and the lines (or rows) in it."""

    xxh3_128: str
    lines: int


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A short document and its ids, to be compared with the reference."""

    place: str
    text: str
    ids: tuple[int, ...]


class ShardRecord(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of a shard. ``bad`` holds (stretch, line in it, reason, detail) of each row set
    aside."""

    number: int
    documents: int
    keys: tuple[KeyRecord, ...]
    stretches: tuple[StretchRecord, ...]
    bad: tuple[tuple[int, int, str, str], ...]
    samples: tuple[Sample, ...]
    engine: str


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """What every shard of a run has in common."""

    folder: Path
    definition: TokenizerDefinition
    json_keys: tuple[str, ...]
    append_eod: bool
    strict: bool
    max_line_bytes: int
    engine: EngineChoice = "auto"
    splitter: SentenceSplitter | None = None
    assembled: int = 0
    """Shards whose parts are in the data set already, and gone."""


class ShardEncoder:
    """Encodes shards; it can be sent to another process, where it opens its engine itself."""

    def __init__(self, options: ShardOptions) -> None:
        self.options = options
        self._engine: Engine | None = None
        self._parser: RowParser | None = None

    def __getstate__(self) -> ShardOptions:
        return self.options

    def __setstate__(self, options: ShardOptions) -> None:
        self.__init__(options)  # type: ignore[misc]

    def open(self) -> Engine:
        """Open the engine now, so that a process forked from this one finds it open."""
        if self._engine is None:
            self._engine = open_engine(self.options.definition, self.options.engine)
            give_back_memory()
        return self._engine

    def close(self) -> None:
        """Let go of the engine and its memory."""
        self._engine = None
        give_back_memory()

    def __call__(self, shard: Shard) -> ShardRecord:
        """The record of a shard whose parts are on disk; one that was done before is not redone.

        Raises
        ------
        DataError
            The input cannot be read or has changed since, a part cannot be written, or a row is
            bad and ``strict`` asks to stop there.
        """
        done = self._done_before(shard)
        if done is not None:
            return done
        engine = self.open()
        try:
            with _Parts(self.options, shard.number) as parts:
                record = self._encode(shard, engine, parts)
            write_record(self.options.folder, record)
        except OSError as error:
            raise DataError(
                f"{record_path(self.options.folder, shard.number)} could not be written: "
                f"{error.strerror or error}."
            ) from error
        return record

    def _done_before(self, shard: Shard) -> ShardRecord | None:
        path = record_path(self.options.folder, shard.number)
        if not path.is_file():
            return None
        record = msgspec.msgpack.decode(path.read_bytes(), type=ShardRecord)
        if self.options.strict and record.bad:
            return None
        if shard.number >= self.options.assembled and not self._parts_are_whole(record):
            return None
        for stretch, known in zip(shard.stretches, record.stretches, strict=True):
            if hash_stretch(stretch) != known.xxh3_128:
                raise DataError(
                    f"{stretch.source} has changed since this run was begun (bytes "
                    f"{stretch.start:,} to {stretch.end:,}); put the old file back, or remove "
                    f"{self.options.folder} to start afresh."
                )
        return record

    def _parts_are_whole(self, record: ShardRecord) -> bool:
        """A machine that lost power may have kept the record and lost what it speaks of."""
        for key, known in enumerate(record.keys):
            paths = part_paths(self.options.folder, record.number, key)
            sizes = {
                "bin": known.bytes,
                "lengths": 4 * known.sequences,
                "sequences": 4 * record.documents,
            }
            for what, path in paths.items():
                if not path.is_file() or path.stat().st_size != sizes[what]:
                    return False
            if file_hash(paths["bin"]) != known.xxh3_128:
                return False
        return True

    def _encode(self, shard: Shard, engine: Engine, parts: _Parts) -> ShardRecord:
        options = self.options
        if self._parser is None:
            self._parser = RowParser(options.json_keys)
        bad: list[tuple[int, int, str, str]] = []
        stretches: list[StretchRecord] = []
        samples: list[Sample] = []
        for number, stretch in enumerate(shard.stretches):
            reader = StretchReader(stretch, self._parser, options.max_line_bytes)
            try:
                for columns in batches(reader):
                    encoded = [self._encode_texts(engine, texts) for texts in columns]
                    parts.add(encoded, columns)
                    if len(samples) < _SAMPLES:
                        samples += _samples(stretch.source, columns[0], encoded[0])
                    if max(map(len, columns[0])) > _HUGE_CHARACTERS:
                        del columns, encoded
                        give_back_memory()
                    if reader.bad and options.strict:
                        break
            except OSError as error:
                raise reading_failed(stretch.source, error) from error
            if reader.bad and options.strict:
                raise _strict(stretch, *reader.bad[0])
            bad += [(number, line, *why) for line, why in reader.bad]
            stretches.append(StretchRecord(reader.digest, reader.lines))
        return ShardRecord(
            number=shard.number,
            documents=parts.documents,
            keys=parts.records(),
            stretches=tuple(stretches),
            bad=tuple(bad),
            samples=tuple(samples[:_SAMPLES]),
            engine=engine.name,
        )

    def _encode_texts(self, engine: Engine, texts: list[str]) -> Part:
        options, splitter = self.options, self.options.splitter
        if splitter is None:
            pieces, counts = texts, np.ones(len(texts), np.int64)
        else:
            split = [splitter.split(text) for text in texts]
            pieces = [sentence for sentences in split for sentence in sentences]
            counts = np.asarray([len(sentences) for sentences in split], np.int64)
        encoded = engine.encode(pieces)
        end = options.definition.eod_id if options.append_eod else None
        return _as_sequences(encoded, counts, end)


class Part(NamedTuple):
    """Ids of some documents as they are stored."""

    ids: npt.NDArray[Any]  # [tokens]
    lengths: npt.NDArray[np.int32]  # [sequences], tokens
    sequences: npt.NDArray[np.int32]  # [documents], sequences


def _as_sequences(encoded: Encoded, counts: npt.NDArray[np.int64], end: int | None) -> Part:
    """Documents of ``counts`` sequences each, with ``end`` after the last of each.

    As in Megatron-LM, a sequence without tokens is none, and a document without any gets no end.
    """
    lengths = encoded.lengths
    if lengths.size and lengths.min() == 0:
        there = lengths > 0
        owner = np.repeat(np.arange(counts.size), counts)
        counts = np.bincount(owner[there], minlength=counts.size)
        lengths = lengths[there]
    ids = encoded.ids
    if end is not None and lengths.size:
        last = np.cumsum(counts[counts > 0]) - 1
        lengths = lengths.copy()
        lengths[last] += 1
        ids = _with_ends(ids, np.cumsum(lengths)[last], end)
    return Part(ids, lengths.astype(np.int32), counts.astype(np.int32))


def _with_ends(ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], end: int) -> npt.NDArray[Any]:
    """``ids`` with ``end`` put in so that each of ``ends`` is one past an inserted id."""
    out = np.empty(ids.size + ends.size, ids.dtype)
    if ids.size < 64 * ends.size:
        mask = np.ones(out.size, bool)
        mask[ends - 1] = False
        out[mask] = ids
        out[ends - 1] = end
        return out
    # Slices are quicker than a mask where documents are long.
    start = 0
    for number, stop in enumerate(ends.tolist()):
        out[start : stop - 1] = ids[start - number : stop - 1 - number]
        out[stop - 1] = end
        start = stop
    return out


class _Parts:
    """The files of one shard; removed again where it fails."""

    def __init__(self, options: ShardOptions, number: int) -> None:
        self._options, self._number = options, number
        self._dtype = best_dtype(options.definition.vocab_size)
        self._stack = ExitStack()
        self._files: list[dict[str, BinaryIO]] = []
        self._tallies = [_KeyTally() for _ in options.json_keys]
        self.documents = 0

    def __enter__(self) -> _Parts:
        for key in range(len(self._options.json_keys)):
            paths = part_paths(self._options.folder, self._number, key)
            self._files.append(
                {
                    what: self._stack.enter_context(path.open("wb", buffering=0))
                    for what, path in paths.items()
                }
            )
        return self

    def add(self, encoded: Sequence[Part], texts: Sequence[list[str]]) -> None:
        definition = self._options.definition
        for files, tally, part, of_key in zip(
            self._files, self._tallies, encoded, texts, strict=True
        ):
            ids = np.ascontiguousarray(part.ids, self._dtype)
            _write_all(files["bin"], ids)
            _write_all(files["lengths"], part.lengths)
            _write_all(files["sequences"], part.sequences)
            tally.add(part, ids, of_key, definition, self._options.append_eod)
        self.documents += len(texts[0])

    def records(self) -> tuple[KeyRecord, ...]:
        return tuple(
            KeyRecord(
                tokens=tally.tokens,
                sequences=tally.sequences,
                text_bytes=tally.text_bytes,
                literal_eods=tally.literal_eods,
                xxh3_128=tally.hash.hexdigest(),
                bytes=tally.tokens * self._dtype.itemsize,
            )
            for tally in self._tallies
        )

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with suppress(OSError):
            self._stack.close()
        if kind is not None:
            drop_parts(self._options.folder, self._number, len(self._options.json_keys))


@dataclass(slots=True)
class _KeyTally:
    tokens: int = 0
    sequences: int = 0
    text_bytes: int = 0
    literal_eods: int = 0
    hash: Any = field(default_factory=xxhash.xxh3_128)

    def add(
        self,
        part: Part,
        ids: npt.NDArray[Any],
        texts: list[str],
        definition: TokenizerDefinition,
        append_eod: bool,
    ) -> None:
        self.tokens += ids.size
        self.sequences += part.lengths.size
        self.hash.update(ids)
        self.text_bytes += sum(
            len(text) if text.isascii() else len(text.encode()) for text in texts
        )
        if definition.literal_eod == "text":
            self.literal_eods += sum(definition.eod_token in text for text in texts)
            return
        # Looking for the id is quicker than looking through the text.
        expected = int(np.count_nonzero(part.sequences)) if append_eod else 0
        if int(np.count_nonzero(ids == definition.eod_id)) > expected:
            self.literal_eods += sum(definition.eod_token in text for text in texts)


def give_back_memory() -> None:
    """Return to the system what the C library keeps of freed memory; a third of what loading a
    tokenizer takes, and what a single huge document took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def part_paths(folder: Path, number: int, key: int) -> dict[str, Path]:
    """The files of a shard for the key of that place in the options."""
    names = ("bin", "lengths", "sequences")
    return {what: folder / f"shard-{number:06d}.{key}.{what}" for what in names}


def record_path(folder: Path, number: int) -> Path:
    """The file whose appearance says that a shard is done."""
    return folder / f"shard-{number:06d}.record"


def write_record(folder: Path, record: ShardRecord) -> None:
    """Say that a shard is done."""
    path = record_path(folder, record.number)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.msgpack.encode(record))
    partial.replace(path)


def drop_parts(folder: Path, number: int, keys: int) -> None:
    """Remove a shard's parts, and leave its record."""
    for key in range(keys):
        for path in part_paths(folder, number, key).values():
            path.unlink(missing_ok=True)


def _write_all(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    view = memoryview(array.view(np.uint8))  # type: ignore[arg-type]
    while view:
        view = view[file.write(view) :]


def _samples(source: str, texts: list[str], part: Part) -> list[Sample]:
    """A few documents that are short enough to be compared in passing, spread over ``texts``."""
    if (part.sequences != 1).any():
        return []
    ends = np.cumsum(part.lengths)
    short = [i for i, text in enumerate(texts) if len(text) <= _SAMPLE_CHARACTERS]
    return [
        Sample(source, texts[i], tuple(part.ids[ends[i] - part.lengths[i] : ends[i]].tolist()))
        for i in short[:: max(1, len(short) // _SAMPLES)]
    ]


def _strict(stretch: Stretch, line: int, why: Bad) -> DataError:
    before = 0
    if stretch.start and not stretch.groups:
        with stretch.file.open("rb") as raw:
            reader = HashingReader(raw, 0, stretch.start)
            while block := reader.read(1 << 20):
                before += block.count(b"\n")
    told = f" ({why.detail})" if why.detail else ""
    return DataError(
        f"{stretch.source}, line {before + line:,}: {why.reason}{told}; mend the row, or leave "
        "--strict out to set such rows aside."
    )
