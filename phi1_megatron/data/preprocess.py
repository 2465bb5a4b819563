"""Documents to token ids to an indexed data set: any number of workers, and resumable.

The inputs are cut into shards. Workers (processes of this machine, or MPI ranks) read, encode and
write one shard at a time; this process hands out the shards, compares a sample of what comes back
with Hugging Face's tokenizer, and puts the parts together in the order of the input, so the bytes
written do not depend on the number of workers.

All of it happens in ``{output_prefix}.parts``. What is finished appears by rename:
``{output_prefix}_{key}_document.bin``, ``.idx`` and ``.report.json`` (``_sentence`` where documents
are split), and, where rows were bad, ``{output_prefix}_bad_rows.jsonl``. A run that was killed is
continued by the same command.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi1_megatron.data import manifest as manifests
from phi1_megatron.data.assembly import Assembly, Renames, publish, unfinished_renames
from phi1_megatron.data.check_process import CheckProcess, Compared
from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.documents import BadRows
from phi1_megatron.data.engine import EngineChoice
from phi1_megatron.data.indexed import best_dtype
from phi1_megatron.data.inputs import MAX_LINE_BYTES, STDIN, find_inputs
from phi1_megatron.data.manifest import Manifest
from phi1_megatron.data.mpi_pool import launched_tasks, mpi_map
from phi1_megatron.data.report import (
    Chunk,
    DatasetReport,
    TokenizerIdentity,
    file_hash,
    report_bytes,
    report_path,
    sampled_entropy_nats,
)
from phi1_megatron.data.report import read_report as read_report
from phi1_megatron.data.sample_check import SampleCheck
from phi1_megatron.data.shard_encoder import (
    ShardEncoder,
    ShardOptions,
    ShardRecord,
)
from phi1_megatron.data.shards import Planned, Shard, drop_pieces, plan, shards
from phi1_megatron.data.worker_pool import WorkerPool
from phi1_megatron.errors import DataError, UsageError

if TYPE_CHECKING:
    from phi1_megatron.data.sentences import SentenceSplitter

OnProgress = Callable[[int, int, int, int], None]
"""Called with (input bytes done, input bytes in all or 0 if unknown, documents, tokens)."""

_CHECKED_AT_ONCE = 2
_CHECKED_LATER = 64
_LONG_SECONDS = 10.0
"""Shards of which documents are compared with the reference as soon as they are done, and how many
more from all over the input at the end of a run that took this long."""


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """What to preprocess.

    Attributes
    ----------
    inputs
        Files, folders, patterns, or ``-``; see ``inputs.find_inputs``.
    output_prefix
        Where the data sets go: ``{output_prefix}_{key}_document``.
    tokenizer
        Turns the text into ids; its ``literal_eod`` says what a literal ``<|endoftext|>`` becomes.
    append_eod
        End every document with the end-of-document id, as pre-training needs.
    json_keys
        Fields to tokenize, each into a data set of its own.
    workers
        Processes that encode; 1 encodes in this one; None takes one a usable core. Under MPI the
        other ranks encode instead.
    strict
        Stop at the first bad row instead of setting it aside.
    splitter
        Cuts documents into sentences, each a sequence of its own.
    engine
        Which library encodes; see ``data.engine``.
    max_line_bytes
        Longer lines are set aside unread.
    shard_bytes
        Input that a worker takes at a time; None chooses by the size of the inputs.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer: TokenizerDefinition
    append_eod: bool
    json_keys: tuple[str, ...] = ("text",)
    workers: int | None = None
    strict: bool = False
    splitter: SentenceSplitter | None = None
    engine: EngineChoice = "auto"
    max_line_bytes: int = MAX_LINE_BYTES
    shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers cannot encode; give 1 or more.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise UsageError(f"the keys {list(self.json_keys)} must be one or more, all different.")

    @property
    def prefixes(self) -> tuple[Path, ...]:
        """The data sets' paths without suffix, one for each key."""
        level = "document" if self.splitter is None else "sentence"
        name = self.output_prefix.name
        return tuple(
            self.output_prefix.with_name(f"{name}_{key}_{level}") for key in self.json_keys
        )


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """What a run wrote: ``datasets`` has one entry for each of the keys.

    ``prefixes`` are the data sets' paths without suffix, ready for ``indexed.read_index``.
    ``resumed_shards`` were there before this run began.
    """

    prefixes: tuple[Path, ...]
    datasets: tuple[DatasetReport, ...]
    quarantine: Path | None
    resumed_shards: int


def preprocess(
    options: PreprocessOptions, on_progress: OnProgress | None = None
) -> PreprocessReport:
    """Tokenize the inputs into indexed data sets, with processes of this machine.

    Raises
    ------
    DataError
        An input cannot be read or changed since the run was begun, nothing usable is in it, a
        worker died, the output cannot be written, a sampled document's ids are not the
        reference's, or a row is bad and ``strict`` asks to stop there.
    UsageError
        An option makes no sense.
    """
    run = _Run(options, on_progress)
    if (options.workers or len(os.sched_getaffinity(0))) > 1:
        run.check_aside()
    return run.result(_local_map(options))


def preprocess_over_ranks(
    options: PreprocessOptions, on_progress: OnProgress | None = None
) -> PreprocessReport | None:
    """The same over the MPI ranks that this command was started as; None on all but rank 0.

    Raises
    ------
    LaunchError
        The copies of this command that were started do not find each other.
    DataError, UsageError
        As :func:`preprocess`, on rank 0.
    """
    with mpi_map() as ranks:
        if ranks is None:
            return None
        mapped, workers = ranks

        @contextmanager
        def over_ranks(encoder: ShardEncoder, most: int) -> Iterator[_Mapped]:
            job = _RankJob.prepare(encoder)
            yield (lambda todo: mapped(todo, job)), workers

        return _Run(options, on_progress).result(over_ranks)


_Mapped = tuple[Callable[[Iterator[Shard]], Iterator[tuple[Shard, ShardRecord]]], int]
_MapOf = Callable[[ShardEncoder, int], AbstractContextManager[_Mapped]]


def _local_map(options: PreprocessOptions) -> _MapOf:
    @contextmanager
    def start(encoder: ShardEncoder, most: int) -> Iterator[_Mapped]:
        wanted = min(options.workers or len(os.sched_getaffinity(0)), most)
        if wanted == 1:
            yield (lambda todo: ((shard, encoder(shard)) for shard in todo)), 1
            return
        encoder.open()  # once, before the workers are forked
        with WorkerPool(encoder, wanted) as pool:
            encoder.close()
            yield (lambda todo: pool.map(todo, place=_place)), wanted

    return start


@dataclass(frozen=True)
class _RankJob:
    """What travels to MPI ranks with every shard: where to find the rest."""

    path: Path
    run: str  # tells apart what one process serves in turn

    @classmethod
    def prepare(cls, encoder: ShardEncoder) -> _RankJob:
        path = encoder.options.folder / "encoder.pickle"
        path.write_bytes(pickle.dumps(encoder))
        return cls(path, uuid.uuid4().hex)

    def __call__(self, shard: Shard) -> ShardRecord:
        return _rank_encoder(self)(shard)


@functools.lru_cache(maxsize=1)
def _rank_encoder(job: _RankJob) -> ShardEncoder:
    encoder = pickle.loads(job.path.read_bytes())
    assert isinstance(encoder, ShardEncoder)
    return encoder


class _Run:
    def __init__(self, options: PreprocessOptions, on_progress: OnProgress | None) -> None:
        self.options = options
        self.on_progress = on_progress or (lambda done, total, documents, tokens: None)
        self.started = time.perf_counter()
        self.folder = manifests.work_folder(options.output_prefix)
        files = tuple(find_inputs(options.inputs))
        self.sizes = {f: 0 if f == STDIN else Path(f).stat().st_size for f in files}
        self.files = files
        self.records: list[ShardRecord] = []
        self.sources: list[tuple[str, ...]] = []
        self.check = SampleCheck(options.tokenizer)
        self.aside: CheckProcess | None = None
        self.checked = 0
        self.later: list[ShardRecord] = []
        self.stride = 1

    def check_aside(self) -> None:
        """Compare with the reference in a process of its own."""
        if self.options.tokenizer.kind == "json":
            self.aside = CheckProcess(self.options.tokenizer)

    def result(self, start: _MapOf) -> PreprocessReport:
        try:
            return self._result(start)
        finally:
            if self.aside is not None:
                self.aside.stop()

    def _result(self, start: _MapOf) -> PreprocessReport:
        with manifests.locked(self.folder):
            manifest = self._manifest()
            renames = unfinished_renames(self.folder)
            if renames is not None:  # killed at the very end
                publish(self.folder, renames)
                manifests.remove(self.folder)
                return self._published()
            try:
                report = self._run(manifest, start)
                publish(self.folder, self._renames(report))
            except BaseException:
                if not any(self.folder.glob("*.record")):
                    manifests.remove(self.folder)  # nothing worth going on from
                raise
            manifests.remove(self.folder)
            return report

    def _manifest(self) -> Manifest:
        """The manifest of the unfinished run that this one goes on with, or a new one."""
        options = self.options
        asked = Manifest(inputs=self.sizes, files=self.files, options=_asked(options))
        begun = manifests.begin(self.folder, asked)
        if begun is not None:
            return begun
        ranks = launched_tasks()[0] - 1
        workers = ranks or options.workers or len(os.sched_getaffinity(0))
        try:
            asked.plan = plan(
                self.sizes, self.files, options.json_keys, workers, options.shard_bytes
            )
        except DataError:
            manifests.remove(self.folder)
            raise
        manifests.write_manifest(self.folder, asked)
        return asked

    def _published(self) -> PreprocessReport:
        """The report of data sets that were brought into place just now."""
        datasets = tuple(
            report for report in map(read_report, self.options.prefixes) if report is not None
        )
        quarantine = self._quarantine_path() if datasets[0].quarantine else None
        return PreprocessReport(self.options.prefixes, datasets, quarantine, 0)

    def _run(self, manifest: Manifest, start: _MapOf) -> PreprocessReport:
        options = self.options
        dtype = best_dtype(options.tokenizer.vocab_size)
        before = len(list(self.folder.glob("*.record")))
        total = 0 if STDIN in self.files else sum(self.sizes[name] for name in self.files)
        with Assembly(self.folder, len(options.json_keys), dtype) as assembly:
            encoder = ShardEncoder(
                ShardOptions(
                    folder=self.folder,
                    definition=options.tokenizer,
                    json_keys=options.json_keys,
                    append_eod=options.append_eod,
                    strict=options.strict,
                    max_line_bytes=options.max_line_bytes,
                    engine=options.engine,
                    splitter=options.splitter,
                    assembled=assembly.progress.shards,
                )
            )
            documents = tokens = 0
            with start(encoder, _most_workers(manifest.plan)) as (mapped, workers):
                self.on_progress(0, total, 0, 0)
                for shard, record in mapped(shards(manifest.plan, self.folder)):
                    self._compare(record)
                    assembly.append(record)
                    drop_pieces(shard)
                    self.records.append(record)
                    self.sources.append(tuple(stretch.source for stretch in shard.stretches))
                    documents += record.documents
                    tokens += sum(key.tokens for key in record.keys)
                    self.on_progress(shard.bytes_done, total, documents, tokens)
            if documents == 0:
                for path in self.folder.glob("*.record"):
                    path.unlink()  # nothing to go on from
                raise DataError(
                    f"{', '.join(options.inputs)}: no usable document ({self._bad_told()}); "
                    "nothing was written."
                )
            self._compare_later()
            finished = assembly.finish()
        return self._report(finished, workers, before)

    def _compare(self, record: ShardRecord) -> None:
        """Compare documents of the first shards with the reference now, of others at the end."""
        number = record.number
        if number < _CHECKED_AT_ONCE:
            self._compare_now(record)
        elif number % self.stride == 0:
            self.later.append(record)
            if len(self.later) > _CHECKED_LATER:
                self.stride *= 2
                self.later = [kept for kept in self.later if kept.number % self.stride == 0]
        if number == _CHECKED_AT_ONCE - 1 and self.aside is not None:
            self.checked = self.aside.finish()

    def _compare_now(self, record: ShardRecord) -> None:
        end = 1 if self.options.append_eod else 0
        samples = [
            Compared(sample.place, sample.text, sample.ids[: len(sample.ids) - end])
            for sample in record.samples
        ]
        if self.aside is not None:
            self.aside.compare(samples)
            return
        for place, text, ids in samples:
            self.check.compare(text, np.asarray(ids, np.int64), place)

    def _compare_later(self) -> None:
        """What is left to compare: from all over the input, where the run was long enough."""
        if self.aside is not None:
            self.checked = self.aside.finish()
            self.aside = None
        if time.perf_counter() - self.started > _LONG_SECONDS:
            for record in self.later:
                self._compare_now(record)

    def _report(
        self, finished: Sequence[tuple[Path, Path]], workers: int, before: int
    ) -> PreprocessReport:
        options = self.options
        quarantine = self._write_quarantine()
        digests = [
            (source, stretch.xxh3_128)
            for record, sources in zip(self.records, self.sources, strict=True)
            for source, stretch in zip(sources, record.stretches, strict=True)
        ]
        dtype = best_dtype(options.tokenizer.vocab_size)
        common = {
            "inputs": {("<stdin>" if n == STDIN else n): size for n, size in self.sizes.items()},
            "input_hashes": manifests.input_hashes(self.files, digests),
            "tokenizer": TokenizerIdentity.of(options.tokenizer),
            "dtype": str(dtype),
            "append_eod": options.append_eod,
            "literal_eod": options.tokenizer.literal_eod,
            "documents": sum(record.documents for record in self.records),
            "bad_rows": dict(sorted(self._bad_counts().items())),
            "quarantine": quarantine.name if quarantine else None,
            "workers": workers,
            "split_sentences": options.splitter is not None,
            "engine": ", ".join(dict.fromkeys(record.engine for record in self.records)),
            "checked_documents": self.checked + self.check.documents,
        }
        datasets = []
        for key, (name, prefix) in enumerate(zip(options.json_keys, options.prefixes, strict=True)):
            parts = [record.keys[key] for record in self.records]
            data, idx = finished[key]
            datasets.append(
                DatasetReport(
                    prefix=prefix.name,
                    json_key=name,
                    tokens=sum(part.tokens for part in parts),
                    sequences=sum(part.sequences for part in parts),
                    text_bytes=sum(part.text_bytes for part in parts),
                    documents_with_literal_eod=sum(part.literal_eods for part in parts),
                    unigram_entropy_nats=sampled_entropy_nats(
                        data, dtype, options.tokenizer.vocab_size
                    ),
                    chunks=tuple(Chunk(part.bytes, part.xxh3_128) for part in parts),
                    idx_xxh3_128=file_hash(idx),
                    seconds=0.0,
                    **common,  # type: ignore[arg-type]
                )
            )
        seconds = time.perf_counter() - self.started
        done = tuple(replace(dataset, seconds=seconds) for dataset in datasets)
        return PreprocessReport(options.prefixes, done, quarantine, before)

    def _renames(self, report: PreprocessReport) -> Renames:
        """What brings the data sets into place: no index stands while its .bin is another's."""
        remove, rename = [], []
        for key, (prefix, dataset) in enumerate(zip(report.prefixes, report.datasets, strict=True)):
            kept = self.folder / f"report.{key}.json"
            kept.write_bytes(report_bytes(dataset))
            idx, data = (str(prefix.with_name(prefix.name + s)) for s in (".idx", ".bin"))
            remove += [idx, str(report_path(prefix))]
            rename += [
                (str(self.folder / f"assembled.{key}.bin"), data),
                (str(self.folder / f"assembled.{key}.idx"), idx),
                (str(kept), str(report_path(prefix))),
            ]
        quarantine = str(self._quarantine_path())
        if report.quarantine is None:
            remove.append(quarantine)
        else:
            rename.append((str(self.folder / "bad_rows.jsonl"), quarantine))
        return Renames(remove, rename)

    def _quarantine_path(self) -> Path:
        prefix = self.options.output_prefix
        return prefix.with_name(f"{prefix.name}_bad_rows.jsonl")

    def _write_quarantine(self) -> Path | None:
        """All bad rows with their line in the input, in the work folder; None if there are none."""
        lines_before: Counter[str] = Counter()
        with BadRows(self.folder / "bad_rows.jsonl") as rows:
            for record, sources in zip(self.records, self.sources, strict=True):
                base: list[int] = []
                for source, stretch in zip(sources, record.stretches, strict=True):
                    base.append(lines_before[source])
                    lines_before[source] += stretch.lines
                for stretch_number, line, reason, detail in record.bad:
                    source = sources[stretch_number]
                    rows.add(source, base[stretch_number] + line, reason, detail)
        return self._quarantine_path() if rows.total else None

    def _bad_counts(self) -> Counter[str]:
        return Counter(reason for record in self.records for _, _, reason, _ in record.bad)

    def _bad_told(self) -> str:
        counts = self._bad_counts().items()
        return ", ".join(f"{count:,} {reason}" for reason, count in counts) or "no rows at all"


def _asked(options: PreprocessOptions) -> dict[str, str]:
    """Every option that decides the bytes written, by its flag."""
    tokenizer = options.tokenizer
    return {
        "the tokenizer": f"{tokenizer.name} {tokenizer.fingerprint[:16]}",
        "the end-of-document token": tokenizer.eod_token,
        "--literal-eod": tokenizer.literal_eod,
        "--json-keys": " ".join(options.json_keys),
        "--append-eod": str(options.append_eod).lower(),
        "--split-sentences": options.splitter.fingerprint if options.splitter else "false",
        "--max-line-bytes": str(options.max_line_bytes),
    }


def _most_workers(planned: Sequence[Planned]) -> int:
    """More workers than shards would only be started."""
    return sys.maxsize if any(item.streamed for item in planned) else max(1, len(planned))


def _place(shard: Shard) -> str:
    first, last = shard.stretches[0], shard.stretches[-1]
    if first is not last:
        return f"{first.source} to {last.source}"
    if first.path:
        return f"a piece of {first.source}"
    if first.groups:
        end = first.first_group + first.groups
        return f"{first.source} row groups {first.first_group:,} to {end - 1:,}"
    return f"{first.source} bytes {first.start:,} to {first.end:,}"
