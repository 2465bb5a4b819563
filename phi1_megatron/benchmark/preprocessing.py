"""Preprocessing side by side: the same input, whole processes, the bytes compared.

Every contender first runs once on a few documents, untimed, so that its programs and libraries lie
in the page cache as the input does (which cannot be emptied without being root). Then it is timed
from start to exit on the whole input. Fast contenders run several times, and once more, untimed,
for their memory; slow ones run once, under sampling that costs at most a hundredth of one core.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from phi1_megatron.benchmark.comparison import digests, first_difference, output_files
from phi1_megatron.benchmark.contenders import (
    Contender,
    MegatronLM,
    TokenizerChoice,
    build_tokenizer,
    contenders_beside_ours,
    ours,
)
from phi1_megatron.benchmark.corpus import (
    InputFacts,
    read_input,
    write_beginning,
    write_python_corpus,
)
from phi1_megatron.benchmark.outcome import (
    MemoryCheck,
    Outcome,
    Row,
    machine_facts,
    version_facts,
)
from phi1_megatron.benchmark.process_tree import Finished, run_tree
from phi1_megatron.errors import DataError, UsageError

Watch = Callable[[str, float], None]
"""Called with (what runs now, seconds since it began)."""

MEMORY_TIMES = 10
"""How many times over the input is read to see that memory does not grow with it."""

_TIMED_SHARE, _UNTIMED_SHARE = 0.01, 0.2
_WARM_UP_MEGABYTES = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes
    ----------
    input
        A JSONL file, or None for Python sources of this machine.
    megabytes
        Text to gather from those sources.
    output
        The folder of the results; what is large lies in it only while this runs.
    repeats
        Timed runs of a fast contender.
    slow_megabytes
        Slow contenders get only this much of the input; None gives them all.
    memory_check
        Run ours on the input 10 times over as well.
    timeout_seconds
        Of each single run.
    """

    vocab_file: Path
    merge_file: Path
    output: Path
    workers: int
    input: Path | None = None
    megabytes: float = 280.0
    tokenizers: tuple[TokenizerChoice, ...] = ("gpt2", "codegen")
    repeats: int = 3
    slow_megabytes: float | None = None
    memory_check: bool = False
    megatron_lm: MegatronLM | None = None
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("workers", "repeats", "megabytes", "slow_megabytes", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be more than 0.")


def measure_preprocessing(
    options: Options, watch: Watch, on_row: Callable[[Row], None] | None = None
) -> Outcome:
    """Run every contender with every tokenizer.

    Raises
    ------
    DataError
        The input or the tokenizer cannot be used, or the output folder cannot be written.
    """
    load_before = os.getloadavg()[0]
    with _work_folder(options.output) as work:
        whole = _prepare_input(options, work, watch)
        bench = _Bench(options, work, whole, watch)
        rows: list[Row] = []
        checks: list[MemoryCheck] = []
        for choice in options.tokenizers:
            for row in bench.rows(choice):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
            if options.memory_check:
                once = next(row for row in rows if row.is_ours and row.tokenizer == choice)
                checks.append(bench.check_memory(choice, once))
    described = "Python sources" if options.input is None else options.input.name
    return Outcome(
        input_description=described,
        input_megabytes=whole.megabytes,
        input_wanted_megabytes=options.megabytes if options.input is None else None,
        input_documents=whole.documents,
        input_sha256=whole.sha256,
        workers=options.workers,
        repeats=options.repeats,
        load_before=load_before,
        machine=machine_facts(),
        versions=version_facts(options.megatron_lm),
        rows=tuple(rows),
        memory_checks=tuple(checks),
    )


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder for what is large, on the disk of the results, gone at the end of the block."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="work-", dir=output.resolve()))
    except OSError as error:
        raise DataError(f"{output} cannot be written to: {error.strerror or error}.") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prepare_input(options: Options, work: Path, watch: Watch) -> InputFacts:
    if options.input is not None:
        watch(f"reading {options.input.name}", 0.0)
        return read_input(options.input.expanduser().resolve())
    watch("gathering Python sources", 0.0)
    began = time.monotonic()
    return write_python_corpus(
        work / "corpus.jsonl",
        options.megabytes,
        on_progress=lambda megabytes: watch(
            f"gathering Python sources, {megabytes:,.0f} MB", time.monotonic() - began
        ),
    )


class _Bench:
    """The runs of one measurement, in a work folder that is removed after them."""

    def __init__(self, options: Options, work: Path, whole: InputFacts, watch: Watch) -> None:
        self._options = options
        self._work = work
        self._watch = watch
        self._whole = whole
        self._few = write_beginning(whole, work / "few.jsonl", _WARM_UP_MEGABYTES)
        self._part = whole
        if options.slow_megabytes is not None and options.slow_megabytes < whole.megabytes:
            self._part = write_beginning(whole, work / "part.jsonl", options.slow_megabytes)

    def rows(self, choice: TokenizerChoice) -> Iterator[Row]:
        """Ours first, then its peers, each compared with it."""
        options = self._options
        tokenizer = build_tokenizer(choice, options.vocab_file, options.merge_file)
        folder = tokenizer.save(self._work / f"tokenizer-{choice}")
        mine = self._ours(choice)
        references: dict[InputFacts, Path] = {}
        # Peers that get a part are compared with ours on that part: start-up weighs as much there.
        for facts in dict.fromkeys((self._whole, self._part)):
            prefix = self._work / f"ours-{len(references)}" / "out"
            row = self._measure(mine, facts, prefix, None)
            yield row
            if row.failure is not None:
                break
            references[facts] = prefix
        peers = contenders_beside_ours(
            choice, folder, tokenizer.eod_token, options.workers, options.megatron_lm
        )
        for peer in peers:
            facts = self._part if peer.slow else self._whole
            yield self._measure(peer, facts, self._work / "peer" / "out", references.get(facts))

    def check_memory(self, choice: TokenizerChoice, once: Row) -> MemoryCheck:
        """Ours on the input many times over, beside the memory that ``once`` took."""
        if once.failure is not None:
            return MemoryCheck(choice, MEMORY_TIMES, None, None, once.failure)
        told = f"{choice}: {once.name}, memory on the input {MEMORY_TIMES} times over"
        inputs = [self._whole.path] * MEMORY_TIMES
        prefix = self._work / "many-times" / "out"
        done, failure = self._run(self._ours(choice), inputs, prefix, told, _UNTIMED_SHARE)
        if failure is None:
            size, expected = output_files(prefix)[0].stat().st_size, once.bin_bytes * MEMORY_TIMES
            if size != expected:
                failure = f"its .bin has {size:,} bytes, not {MEMORY_TIMES} x {once.bin_bytes:,}"
        shutil.rmtree(prefix.parent)
        repeated = None if done is None else done.memory
        return MemoryCheck(choice, MEMORY_TIMES, once.memory, repeated, failure)

    def _ours(self, choice: TokenizerChoice) -> Contender:
        options = self._options
        return ours(
            choice, options.vocab_file.resolve(), options.merge_file.resolve(), options.workers
        )

    def _measure(
        self, contender: Contender, facts: InputFacts, prefix: Path, reference: Path | None
    ) -> Row:
        """Warm up, time, look at the memory, compare; a failure on the way ends the row."""
        row = Row(
            tokenizer=contender.tokenizer,
            key=contender.key,
            name=contender.name,
            command=tuple(contender.command([facts.path], prefix)),
            megabytes=facts.megabytes,
            documents=facts.documents,
            failure=contender.absent,
        )
        if row.failure is not None:
            return row
        label = f"{contender.tokenizer}: {contender.name}"
        _, failure = self._run(contender, [self._few.path], prefix, f"{label}, warming up")
        if failure is not None:
            return replace(row, failure=failure)
        repeats = 1 if contender.slow else self._options.repeats
        for number in range(1, repeats + 1):
            told = f"{label}, run {number} of {repeats}"
            share = _TIMED_SHARE if contender.slow else 0.0
            done, failure = self._run(contender, [facts.path], prefix, told, share)
            if done is None or failure is not None:
                return replace(row, failure=failure)
            row = replace(
                row,
                seconds=(*row.seconds, done.seconds),
                processor_seconds=(*row.processor_seconds, done.processor_seconds),
                memory=done.memory,
            )
            row = self._compared(row, prefix, reference)
        if contender.slow:
            return replace(row, memory_in_timed_run=True)
        done, failure = self._run(
            contender, [facts.path], prefix, f"{label}, memory", _UNTIMED_SHARE
        )
        return replace(row, memory=None if done is None else done.memory, failure=failure)

    def _compared(self, row: Row, prefix: Path, reference: Path | None) -> Row:
        """Note what was written; an earlier run's difference stays."""
        self._watch(f"{row.tokenizer}: {row.name}, comparing the bytes", 0.0)
        written = digests(prefix)
        difference = row.difference
        if difference is None and row.digests not in ({}, written):
            difference = "two runs of it wrote different bytes"
        if difference is None and reference is not None:
            difference = first_difference(reference, prefix)
        size = output_files(prefix)[0].stat().st_size
        return replace(
            row,
            digests=written,
            difference=difference,
            bin_bytes=size,
            compared=row.compared or reference is not None,
        )

    def _run(
        self,
        contender: Contender,
        inputs: Sequence[Path],
        prefix: Path,
        told: str,
        share: float = 0.0,
    ) -> tuple[Finished | None, str | None]:
        """One run into a folder made new for it, and why it failed, if it did."""
        shutil.rmtree(prefix.parent, ignore_errors=True)
        prefix.parent.mkdir()
        log = self._work / "stderr.txt"
        self._watch(told, 0.0)
        try:
            done = run_tree(
                contender.command(inputs, prefix),
                environment=contender.environment,
                stderr=log,
                timeout_seconds=self._options.timeout_seconds,
                sampling_share=share,
                on_tick=lambda seconds: self._watch(told, seconds),
            )
        except OSError as error:
            return None, f"it could not be started: {error.strerror or error}"
        if done.exit_code is None:
            return done, f"killed after {self._options.timeout_seconds:,.0f} s (--timeout-seconds)"
        if done.exit_code != 0:
            kept = f"{contender.tokenizer}-{contender.key}.stderr.txt"
            shutil.copyfile(log, self._options.output / kept)
            return done, f"{_last_line(log, done.exit_code)} ({kept})"
        absent = [path.suffix for path in output_files(prefix) if not path.is_file()]
        if absent:
            return done, f"it ended well and wrote no {' and no '.join(absent)}"
        return done, None


def _last_line(log: Path, exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {exit_code}, and nothing said"
