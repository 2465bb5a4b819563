"""``phi1 benchmark preprocess|read``: measure this package beside others, on this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from phi1_megatron.benchmark.outcome import MemoryCheck, Outcome, Row
    from phi1_megatron.benchmark.preprocessing import Watch
    from phi1_megatron.benchmark.process_tree import PeakMemory

PLAIN_SECONDS = 30.0
"""Least time between two lines about one run, where the output is not a terminal."""


def preprocess(
    *,
    vocab_file: Path,
    merge_file: Path,
    input: Path | None = None,
    megabytes: float = 280.0,
    tokenizers: Annotated[
        tuple[Literal["gpt2", "codegen"], ...], Parameter(consume_multiple=True, negative="")
    ] = ("gpt2", "codegen"),
    workers: int | None = None,
    repeats: int = 3,
    slow_megabytes: float | None = None,
    memory_check: Annotated[bool, Parameter(negative="")] = False,
    megatron_lm: Path | None = None,
    megatron_lm_python: Path | None = None,
    output: Path = Path("runs/benchmark-preprocess"),
    timeout_seconds: float = 1800.0,
) -> None:
    """Measure phi1 preprocess beside Hugging Face's tokenizers and Megatron-LM's own tools.

    Whole processes on the same input, start to exit, and the .bin and .idx compared byte for byte.
    Prints a table and writes results.json and results.png. Exits with 1 where bytes differ or
    phi1 preprocess fails; another contender that fails is a row that says why.

    Parameters
    ----------
    vocab_file
        GPT-2's vocab.json.
    merge_file
        GPT-2's merges.txt.
    input
        Plain JSONL with a text in every line; the Python sources installed here by default.
    megabytes
        How much text to gather from those sources.
    tokenizers
        Which tokenizers to measure with; codegen is phi-1's.
    workers
        Processes or threads of each contender; all usable cores by default.
    repeats
        Timed runs of the fast contenders, of which the median counts. The slow ones (Hugging Face,
        Megatron-LM's preprocess_data.py) run once.
    slow_megabytes
        Give the slow ones only the first so many megabytes, beside phi1 preprocess on the same.
    memory_check
        Run phi1 preprocess on the input ten times over too: its memory should stay the same.
    megatron_lm
        A checkout of Megatron-LM, whose tools are then measured.
    megatron_lm_python
        An interpreter that has what they need; this one by default.
    output
        Folder for the results.
    timeout_seconds
        Of each single run; what takes longer is killed.
    """
    from phi1_megatron.benchmark.contenders import MegatronLM
    from phi1_megatron.benchmark.plot import plot_speeds
    from phi1_megatron.benchmark.preprocessing import Options, measure_preprocessing
    from phi1_megatron.commands.interruption import terminating_as_interrupt

    peer = None
    if megatron_lm is not None:
        # Not resolved: a virtual environment's interpreter is a link, and it must be run as one.
        python = Path(megatron_lm_python or sys.executable).expanduser().absolute()
        peer = MegatronLM(megatron_lm.expanduser().resolve(), python)
    options = Options(
        vocab_file=vocab_file,
        merge_file=merge_file,
        output=output,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        input=input,
        megabytes=megabytes,
        tokenizers=tokenizers,
        repeats=repeats,
        slow_megabytes=slow_megabytes,
        memory_check=memory_check,
        megatron_lm=peer,
        timeout_seconds=timeout_seconds,
    )
    console = Console(stderr=True)
    with terminating_as_interrupt(), _watching(console) as watch:
        outcome = measure_preprocessing(options, watch, lambda row: _tell_row(row, console))
    outcome.write(output / "results.json")
    plot_speeds(outcome, output / "results.png")
    show(outcome, Console())
    Console().print(f"[dim]{escape(str(output))}: results.json, results.png[/]", soft_wrap=True)
    if not outcome.is_sound:
        raise SystemExit(1)


def read(prefix: Path, /, *, seq_length: int = 2048, samples: int = 8192, repeats: int = 7) -> None:
    """Measure how fast training reads samples, beside megatron-core's own GPTDataset.

    Parameters
    ----------
    prefix
        A data set's path without .bin or .idx.
    seq_length
        Tokens in a sample.
    samples
        Samples of each pass, in random order.
    repeats
        Pairs of passes, taken in turns; the medians count.
    """
    from phi1_megatron.benchmark.reading import benchmark_read_text, measure_reading
    from phi1_megatron.errors import UsageError

    for flag, value in (("seq-length", seq_length), ("samples", samples), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"--{flag} {value} must be 1 or more.")
    with Console(stderr=True).status("Reading samples in turns ..."):
        measurement = measure_reading(prefix, seq_length, samples, repeats)
    Console().print(benchmark_read_text(measurement), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    """Say what runs and for how long: one line that changes, or plain lines now and then."""
    if console.is_terminal:
        # Drawn rarely: what is measured has the processor.
        with console.status("", refresh_per_second=2) as status:
            yield lambda what, seconds: status.update(f"{escape(what)}, {seconds:,.0f} s")
        return
    said = 0.0

    def tell(what: str, seconds: float) -> None:
        nonlocal said
        if seconds == 0.0 or time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            after = f", {seconds:,.0f} s" if seconds else ""
            console.print(f"{escape(what)}{after}", highlight=False, soft_wrap=True)

    yield tell


def _tell_row(row: Row, console: Console) -> None:
    seconds = row.median_seconds
    found = "failed" if seconds is None else f"{seconds:,.2f} s"
    console.print(
        f"{row.tokenizer}: {escape(row.name)}, {row.megabytes:,.0f} MB: {found}", highlight=False
    )


def show(outcome: Outcome, console: Console) -> None:
    """Print the tables, what went wrong, and what to know; at most 80 columns."""
    machine = outcome.machine
    console.print(
        f"[bold]{escape(outcome.input_description)}[/], {outcome.input_megabytes:,.1f} MB of text "
        f"in {outcome.input_documents:,} documents; {outcome.workers} workers on "
        f"{machine['usable_cores']} cores, {escape(machine['cpu'])}",
        highlight=False,
    )
    for tokenizer in dict.fromkeys(row.tokenizer for row in outcome.rows):
        console.print(speed_table(outcome, tokenizer))
    for row in outcome.rows:
        place = f"{row.tokenizer}: {escape(outcome.label(row))}"
        if row.difference is not None:
            console.print(f"[bold red]OTHER BYTES: {place}: {escape(row.difference)}[/]")
        if row.failure is not None:
            console.print(f"[yellow]{place} failed:[/] {escape(row.failure)}", highlight=False)
    for check in outcome.memory_checks:
        console.print(_memory_sentence(check), highlight=False)
    for note in outcome.notes():
        console.print(f"[dim]{escape(note)}[/]", highlight=False)


def speed_table(outcome: Outcome, tokenizer: str) -> Table:
    """One row a contender, ours first."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{tokenizer} tokenizer", title_justify="left")
    table.add_column("path", overflow="fold")
    for heading in ("seconds", "MB/s", "ours is", "peak MB\nPSS / RSS"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same\nbytes?", no_wrap=True)
    for row in outcome.rows:
        if row.tokenizer == tokenizer:
            table.add_row(*_cells(outcome, row), style="bold" if row.is_ours else None)
    return table


def _cells(outcome: Outcome, row: Row) -> tuple[str, ...]:
    name = escape(outcome.label(row))
    seconds, speed, times = row.median_seconds, row.megabytes_per_second, outcome.times_faster(row)
    if seconds is None or speed is None:
        return (name, "-", "-", "-", "-", "[yellow]failed[/]")
    same = "[green]yes[/]" if row.compared else "-"
    if row.is_ours:
        same = "ours"
    if row.difference is not None:
        same = "[bold red]NO[/]"
    return (
        name,
        f"{seconds:,.2f}",
        f"{speed:,.1f}",
        "-" if times is None or row.is_ours else f"{times:,.1f}x",
        _megabytes(row.memory),
        same,
    )


def _megabytes(memory: PeakMemory | None) -> str:
    if memory is None:
        return "-"
    pss = "?" if memory.pss_bytes is None else f"{memory.pss_bytes / 1e6:,.0f}"
    return f"{pss} / {memory.rss_bytes / 1e6:,.0f}"


def _memory_sentence(check: MemoryCheck) -> str:
    if check.failure is not None:
        return f"[bold red]{check.tokenizer}: memory check failed:[/] {escape(check.failure)}"
    return (
        f"{check.tokenizer}: phi1 preprocess peaks at {_megabytes(check.once)} MB (PSS / RSS) on "
        f"the input, at {_megabytes(check.repeated)} MB on it {check.times} times over."
    )
