"""Documents to token ids to an indexed data set, with any number of worker processes.

The parent reads, writes and counts; workers encode. Batches come back in the order of the input,
so the bytes written do not depend on the number of workers. Results appear under their names by
rename at the end: ``{output_prefix}_{key}_document.bin``, ``.idx`` and ``.report.json``, and, where
rows were bad, ``{output_prefix}_bad_rows.jsonl``. A failure leaves none of them half-written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.documents import BadRows, RowReader
from phi1_megatron.data.indexed import IndexedDatasetWriter, best_dtype
from phi1_megatron.data.report import (
    DatasetReport,
    TokenizerIdentity,
    entropy_nats,
    report_path,
    write_report,
)
from phi1_megatron.data.report import read_report as read_report
from phi1_megatron.data.tokenizer import LiteralEod, Tokenizer
from phi1_megatron.data.worker_pool import WorkerPool
from phi1_megatron.errors import DataError, UsageError

Progress = Callable[[int, int, int, int], None]
"""Called with (input bytes done, input bytes in all or 0 if unknown, documents, tokens)."""

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """What to preprocess.

    Attributes
    ----------
    inputs
        Files, folders, patterns, or ``-``; see ``documents.find_inputs``.
    output_prefix
        Where the data sets go: ``{output_prefix}_{key}_document``.
    tokenizer
        Turns the text into ids.
    append_eod
        End every document with the end-of-document id, as pre-training needs.
    json_keys
        Fields to tokenize, each into a data set of its own.
    workers
        Processes that encode; 1 encodes in this one; None takes one a usable core.
    strict
        Stop at the first bad row instead of setting it aside.
    literal_eod
        What a literal ``<|endoftext|>`` in a text becomes; see ``data.tokenizer``.
    batch_bytes
        Text sent to a worker at a time.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer: Tokenizer
    append_eod: bool
    json_keys: tuple[str, ...] = ("text",)
    workers: int | None = None
    strict: bool = False
    literal_eod: LiteralEod = "eod"
    batch_bytes: int = _BATCH_BYTES

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers cannot encode; give 1 or more.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise UsageError(f"the keys {list(self.json_keys)} must be one or more, all different.")


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """What a run wrote: ``datasets`` has one entry for each of the keys.

    ``prefixes`` are the data sets' paths without suffix, ready for ``indexed.read_index``.
    """

    prefixes: tuple[Path, ...]
    datasets: tuple[DatasetReport, ...]
    quarantine: Path | None


def preprocess(options: PreprocessOptions, on_progress: Progress | None = None) -> PreprocessReport:
    """Tokenize the inputs into indexed data sets.

    Raises
    ------
    DataError
        An input cannot be read, nothing usable is in it, a worker died, the output
        cannot be written, or a row is bad and ``strict`` asks to stop there.
    UsageError
        An option makes no sense.
    """
    started = time.perf_counter()
    prefixes = tuple(
        options.output_prefix.with_name(f"{options.output_prefix.name}_{key}_document")
        for key in options.json_keys
    )
    quarantine = options.output_prefix.with_name(f"{options.output_prefix.name}_bad_rows.jsonl")
    tokenizer = options.tokenizer.with_literal_eod(options.literal_eod)
    tallies = tuple(_Tally(tokenizer.vocab_size) for _ in options.json_keys)

    with ExitStack() as stack:
        bad_rows = stack.enter_context(BadRows(quarantine, options.strict))
        reader = RowReader(options.inputs, options.json_keys, bad_rows)
        writers = [
            stack.enter_context(IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size)))
            for prefix in prefixes
        ]
        workers = _useful_workers(options, reader.bytes_total)
        batches = _batches(reader, options.batch_bytes)
        for batch, encoded in _encoded(batches, tokenizer, options.append_eod, workers):
            for writer, tally, part in zip(writers, tallies, encoded, strict=True):
                writer.add_documents(part.ids, part.lengths)
                tally.add(part)
            if on_progress is not None:
                tokens = sum(writer.num_tokens for writer in writers)
                documents = writers[0].num_documents
                on_progress(batch.bytes_done, reader.bytes_total, documents, tokens)
        if writers[0].num_documents == 0:
            told = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows.counts.items())
            raise DataError(
                f"{', '.join(options.inputs)}: no usable document ({told or 'no rows at all'}); "
                "nothing was written."
            )
        reports = tuple(
            DatasetReport(
                prefix=prefix.name,
                json_key=key,
                inputs=dict(reader.sizes),
                tokenizer=TokenizerIdentity.of(tokenizer),
                dtype=str(writer.dtype),
                append_eod=options.append_eod,
                literal_eod=options.literal_eod,
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                text_bytes=tally.text_bytes,
                documents_with_literal_eod=tally.literal_eods,
                unigram_entropy_nats=entropy_nats(tally.counts),
                bad_rows=dict(sorted(bad_rows.counts.items())),
                quarantine=quarantine.name if bad_rows.total else None,
                workers=workers,
                seconds=0.0,
            )
            for prefix, key, writer, tally in zip(
                prefixes, options.json_keys, writers, tallies, strict=True
            )
        )
        for writer in writers:
            writer.finish()  # what can fail fails here, before any data set is replaced
        for prefix in prefixes:
            report_path(prefix).unlink(missing_ok=True)  # an earlier run's speaks of other tokens
    seconds = time.perf_counter() - started
    reports = tuple(replace(report, seconds=seconds) for report in reports)
    for prefix, report in zip(prefixes, reports, strict=True):
        write_report(prefix, report)
    return PreprocessReport(prefixes, reports, quarantine if bad_rows.total else None)


class Batch(NamedTuple):
    """Documents that travel to a worker together."""

    texts: tuple[list[str], ...]  # for each key, one text a document
    place: str
    bytes_done: int


class Encoded(NamedTuple):
    """The ids of a batch's documents for one key."""

    ids: npt.NDArray[Any]  # [tokens], the data set's dtype
    lengths: npt.NDArray[np.int64]  # [documents], tokens of each
    text_bytes: int
    literal_eods: int


class Encoder:
    """What a worker does to a batch; everything in it can be sent to another process."""

    def __init__(self, tokenizer: Tokenizer, append_eod: bool) -> None:
        self._sent = (
            tokenizer.to_json(),
            tokenizer.name,
            tokenizer.eod_token,
            tokenizer.literal_eod,
        )
        self._append_eod = append_eod
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        return (self._sent, self._append_eod)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._sent, self._append_eod = state
        self._tokenizer = None

    def __call__(self, texts: tuple[list[str], ...]) -> tuple[Encoded, ...]:
        """Encode one batch: for each key, its documents' texts."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_json(*self._sent)
        return tuple(self._encode(self._tokenizer, of_key) for of_key in texts)

    def _encode(self, tokenizer: Tokenizer, texts: list[str]) -> Encoded:
        end = [tokenizer.eod_id] if self._append_eod else []
        # One text a call keeps the library to this process's one thread: workers are the threads.
        documents = [tokenizer.encode(text) + end for text in texts]
        return Encoded(
            ids=np.asarray(
                [token for ids in documents for token in ids], best_dtype(tokenizer.vocab_size)
            ),
            lengths=np.asarray([len(ids) for ids in documents], np.int64),
            text_bytes=sum(len(text.encode()) for text in texts),
            literal_eods=sum(tokenizer.eod_token in text for text in texts),
        )


@dataclass(slots=True)
class _Tally:
    vocab_size: int
    text_bytes: int = 0
    literal_eods: int = 0
    counts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.vocab_size, np.int64)

    def add(self, part: Encoded) -> None:
        self.counts += np.bincount(part.ids, minlength=self.vocab_size)
        self.text_bytes += part.text_bytes
        self.literal_eods += part.literal_eods


def _batches(reader: RowReader, batch_bytes: int) -> Iterator[Batch]:
    """Group rows until their text reaches about ``batch_bytes``."""
    texts: tuple[list[str], ...] = tuple([] for _ in reader.json_keys)
    size, first = 0, ""
    for row in reader:
        first = first or f"{row.source} line {row.line:,}"
        for of_key, text in zip(texts, row.texts, strict=True):
            of_key.append(text)
            size += len(text)
        if size >= batch_bytes:
            yield Batch(texts, f"{first} to {row.source} line {row.line:,}", reader.bytes_done)
            texts, size, first = tuple([] for _ in reader.json_keys), 0, ""
    if first:
        yield Batch(texts, f"{first} to the end", reader.bytes_done)


def _encoded(
    batches: Iterable[Batch], tokenizer: Tokenizer, append_eod: bool, workers: int
) -> Iterator[tuple[Batch, tuple[Encoded, ...]]]:
    encoder = Encoder(tokenizer, append_eod)
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch.texts)
        return
    with WorkerPool(encoder, workers) as pool:
        yield from pool.map(batches, payload=lambda b: b.texts, place=lambda b: b.place)


def _useful_workers(options: PreprocessOptions, bytes_total: int) -> int:
    wanted = options.workers or len(os.sched_getaffinity(0))
    # Starting a process costs more than encoding the batch that it would never get.
    return min(
        wanted, max(1, math.ceil(bytes_total / options.batch_bytes)) if bytes_total else wanted
    )
