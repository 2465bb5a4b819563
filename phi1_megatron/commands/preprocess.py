"""``phi1 preprocess``: documents to an indexed data set, with Megatron-LM's flag names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape

from phi1_megatron.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from phi1_megatron.data.preprocess import PreprocessReport
    from phi1_megatron.data.report import DatasetReport
    from phi1_megatron.data.tokenizer import Tokenizer

Several = Parameter(consume_multiple=True, negative="")
Flag = Parameter(negative="")


def preprocess(
    *,
    input: Annotated[list[str], Several],
    output_prefix: Path,
    tokenizer_type: Literal["CodeGenTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer"],
    json_keys: Annotated[tuple[str, ...], Several] = ("text",),
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    tokenizer_model: Path | None = None,
    append_eod: Annotated[bool, Flag] = False,
    workers: int | None = None,
    partitions: int = 1,
    log_interval: int = 1000,
    literal_eod: Literal["eod", "text"] = "eod",
    strict: Annotated[bool, Flag] = False,
) -> None:
    """Tokenize documents into megatron-core's .bin and .idx files.

    Writes OUTPUT_PREFIX_KEY_document.bin, .idx and .report.json for each of the keys. Rows that
    cannot be used are counted and listed in OUTPUT_PREFIX_bad_rows.jsonl.

    Parameters
    ----------
    input
        Files, folders, quoted patterns, or - for standard input: JSONL, plain or .gz, .zst, .bz2,
        .xz, and .parquet.
    output_prefix
        Path and beginning of the names of what is written.
    tokenizer_type
        CodeGenTokenizer is phi-1's; it and GPT2BPETokenizer take GPT-2's --vocab-file and
        --merge-file. HuggingFaceTokenizer takes --tokenizer-model.
    json_keys
        Fields to tokenize, each into a data set of its own.
    vocab_file
        vocab.json of a byte-level BPE.
    merge_file
        merges.txt of a byte-level BPE.
    tokenizer_model
        A folder that holds tokenizer.json, or that file.
    append_eod
        End every document with the end-of-document token. Pre-training needs it.
    workers
        Processes that encode; all usable cores where not given. The output does not depend on it.
    partitions
        Taken for Megatron-LM's sake: any number of files is read by any number of workers here.
    log_interval
        Documents between two progress lines where the output is not a terminal.
    literal_eod
        What a literal <|endoftext|> inside a text becomes: "eod", the end-of-document id, as in
        Megatron-LM; or "text", ordinary characters.
    strict
        Stop at the first bad row.
    """
    from rich.console import Console

    from phi1_megatron.commands.interruption import terminating_as_interrupt
    from phi1_megatron.data import preprocess as work

    if partitions < 1 or log_interval < 1:
        raise UsageError(
            f"--partitions {partitions} and --log-interval {log_interval} must be 1 or more."
        )
    console = Console(stderr=True)
    options = work.PreprocessOptions(
        inputs=tuple(input),
        output_prefix=output_prefix,
        tokenizer=choose_tokenizer(tokenizer_type, vocab_file, merge_file, tokenizer_model),
        append_eod=append_eod,
        json_keys=json_keys,
        workers=workers,
        strict=strict,
        literal_eod=literal_eod,
    )
    with terminating_as_interrupt():
        report = run_with_progress(options, console, log_interval)
    show_report(report, Console())


def choose_tokenizer(
    tokenizer_type: str,
    vocab_file: Path | None,
    merge_file: Path | None,
    tokenizer_model: Path | None,
) -> Tokenizer:
    """The tokenizer that the flags name.

    Raises
    ------
    UsageError
        A flag that this type needs was not given.
    DataError
        A file is missing or is not what it should be.
    """
    from phi1_megatron.data.tokenizer import Tokenizer, codegen_tokenizer, gpt2_tokenizer

    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None:
            raise UsageError(
                "HuggingFaceTokenizer needs --tokenizer-model, a folder that holds tokenizer.json."
            )
        return Tokenizer.load(tokenizer_model)
    if vocab_file is None or merge_file is None:
        absent = "--vocab-file" if vocab_file is None else "--merge-file"
        raise UsageError(f"{tokenizer_type} needs {absent}: GPT-2's vocab.json and merges.txt.")
    build = codegen_tokenizer if tokenizer_type == "CodeGenTokenizer" else gpt2_tokenizer
    return build(vocab_file, merge_file)


def run_with_progress(
    options: object, console: Console, log_interval: int = 1000
) -> PreprocessReport:
    """Preprocess under a progress bar (plain lines where ``console`` is no terminal)."""
    from phi1_megatron.commands.progress import progress_bar
    from phi1_megatron.data.preprocess import PreprocessOptions, preprocess

    assert isinstance(options, PreprocessOptions)
    started, next_line = time.monotonic(), log_interval
    with progress_bar(console, "Tokenizing", plain_seconds=0.0) as show:

        def on_progress(done: int, total: int, documents: int, tokens: int) -> None:
            nonlocal next_line
            if not console.is_terminal:
                if documents < next_line:
                    return
                next_line = documents + log_interval
            seconds = max(time.monotonic() - started, 1e-9)
            beside = f"{done / 1e6 / seconds:.1f} MB/s {short(tokens / seconds)} tokens/s"
            if not console.is_terminal:
                beside = f"{documents:,} documents  {short(tokens)} tokens  {beside}"
            show(done, total, beside)

        return preprocess(options, on_progress)


def short(number: float) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M, 7.89G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def show_report(report: PreprocessReport, console: Console) -> None:
    """Print what was written, and what deserves a second look, in at most 80 columns."""
    for prefix, dataset in zip(report.prefixes, report.datasets, strict=True):
        _show_dataset(prefix, dataset, console)
    first = report.datasets[0]
    if first.bad_rows:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in first.bad_rows.items())
        console.print(
            f"[yellow]Rows set aside:[/] {counts}; listed in {escape(str(report.quarantine))}"
        )
    eod = first.tokenizer.eod_token
    if not first.append_eod:
        console.print(
            f"[yellow]Documents do not end in {eod}:[/] a model cannot learn where one stops. "
            "Pre-training wants --append-eod."
        )
    literal = max(dataset.documents_with_literal_eod for dataset in report.datasets)
    if literal and first.literal_eod == "eod":
        console.print(
            f"[yellow]{literal:,} documents hold a literal {eod}:[/] it became the "
            "end-of-document id, as in Megatron-LM. --literal-eod text keeps it text."
        )


def _show_dataset(prefix: Path, dataset: DatasetReport, console: Console) -> None:
    seconds = max(dataset.seconds, 1e-9)
    speed = f"{dataset.text_bytes / 1e6 / seconds:.1f} MB/s, {short(dataset.tokens / seconds)}"
    console.print(f"[bold]{escape(str(prefix))}[/].bin, .idx, .report.json", soft_wrap=True)
    facts = {
        "documents": f"{dataset.documents:,} ({dataset.text_bytes / 1e6:,.1f} MB of text)",
        "tokens": f"{dataset.tokens:,} as {dataset.dtype}",
        "tokenizer": f"{dataset.tokenizer.name}, vocabulary {dataset.tokenizer.vocab_size:,}",
        "entropy": f"{dataset.unigram_entropy_nats:.3f} nats per token (unigram)",
        "time": f"{dataset.seconds:,.1f} s, {speed} tokens/s, {dataset.workers} workers",
    }
    for name, value in facts.items():
        console.print(f"  {name:<10} {value}", highlight=False)
