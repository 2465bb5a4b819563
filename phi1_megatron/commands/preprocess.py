"""``phi1 preprocess``: documents to an indexed data set, with Megatron-LM's flag names."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar

from cyclopts import Parameter

from phi1_megatron.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from phi1_megatron.commands.progress import Show
    from phi1_megatron.data.definition import TokenizerDefinition
    from phi1_megatron.data.preprocess import PreprocessReport
    from phi1_megatron.data.report import DatasetReport
    from phi1_megatron.data.sentences import SentenceSplitter

TokenizerType: TypeAlias = Literal[
    "CodeGenTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"
]

Report = TypeVar("Report", bound="PreprocessReport | None")

Several = Parameter(consume_multiple=True, negative="")
Flag = Parameter(negative="")


def preprocess(
    *,
    input: Annotated[list[str], Several],
    output_prefix: Path,
    tokenizer_type: TokenizerType,
    json_keys: Annotated[tuple[str, ...], Several] = ("text",),
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    tokenizer_model: Path | None = None,
    append_eod: Annotated[bool, Flag] = False,
    split_sentences: Annotated[bool, Flag] = False,
    keep_newlines: Annotated[bool, Flag] = False,
    lang: str = "english",
    workers: int | None = None,
    partitions: int = 1,
    keep_sequential_samples: Annotated[bool, Flag] = False,
    log_interval: int = 1000,
    literal_eod: Literal["eod", "text"] = "eod",
    engine: Literal["auto", "fastokens", "huggingface"] = "auto",
    max_line_bytes: int = 64 << 20,
    strict: Annotated[bool, Flag] = False,
) -> None:
    """Tokenize documents into megatron-core's .bin and .idx files.

    Writes OUTPUT_PREFIX_KEY_document.bin, .idx and .report.json for each of the keys. Rows that
    cannot be used are counted and listed in OUTPUT_PREFIX_bad_rows.jsonl. A run that was stopped
    or killed goes on when the same command is given again. mpirun and srun spread it over hosts
    that share a folder.

    Parameters
    ----------
    input
        Files, folders, quoted patterns, or - for standard input: JSONL, plain or .gz, .zst, .bz2,
        .xz, and .parquet.
    output_prefix
        Path and beginning of the names of what is written.
    tokenizer_type
        CodeGenTokenizer is phi-1's; it and GPT2BPETokenizer take GPT-2's --vocab-file and
        --merge-file. HuggingFaceTokenizer and SentencePieceTokenizer take --tokenizer-model.
    json_keys
        Fields to tokenize, each into a data set of its own.
    vocab_file
        vocab.json of a byte-level BPE.
    merge_file
        merges.txt of a byte-level BPE.
    tokenizer_model
        A folder that holds tokenizer.json, or the file; a SentencePiece .model.
    append_eod
        End every document with the end-of-document token. Pre-training needs it.
    split_sentences
        Make each sentence a sequence of its own (NLTK's Punkt; trained on the input where it is
        not installed). Blocks of code stay whole. The names then end in _sentence.
    keep_newlines
        Keep the line ends between sentences.
    lang
        Language of the Punkt model.
    workers
        Processes that encode; by default one a usable core. Under MPI the ranks encode instead.
    partitions
        Taken for Megatron-LM's sake: the input is cut by size, and the order of documents is
        always that of the input.
    keep_sequential_samples
        Taken for Megatron-LM's sake: the order is always kept.
    log_interval
        Documents between two lines where output is not a terminal.
    literal_eod
        What a literal <|endoftext|> inside a text becomes: "eod", the end-of-document id, as in
        Megatron-LM; or "text", ordinary characters.
    engine
        What encodes: auto takes the quickest that knows the tokenizer; huggingface is the
        reference, with which a sample is compared in every run.
    max_line_bytes
        Longer lines are set aside unread.
    strict
        Stop at the first bad row.
    """
    # Libraries' own threads would only get in the workers' way, and one thread can be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from phi1_megatron.commands.interruption import terminating_as_interrupt
    from phi1_megatron.data.mpi_pool import launched_tasks
    from phi1_megatron.data.preprocess import PreprocessOptions, preprocess_over_ranks
    from phi1_megatron.data.preprocess import preprocess as preprocess_here

    if partitions < 1 or log_interval < 1:
        raise UsageError(
            f"--partitions {partitions} and --log-interval {log_interval} must be 1 or more."
        )
    definition = choose_tokenizer(tokenizer_type, vocab_file, merge_file, tokenizer_model)
    options = PreprocessOptions(
        inputs=tuple(input),
        output_prefix=output_prefix,
        tokenizer=replace(definition, literal_eod=literal_eod),
        append_eod=append_eod,
        json_keys=json_keys,
        workers=workers,
        strict=strict,
        engine=engine,
        max_line_bytes=max_line_bytes,
        splitter=choose_splitter(input, json_keys, lang, keep_newlines)
        if split_sentences
        else None,
    )
    over_ranks = launched_tasks()[0] > 1
    work = preprocess_over_ranks if over_ranks else preprocess_here
    with terminating_as_interrupt():
        report = run_with_progress(lambda show: work(options, show), log_interval)
    if report is not None:  # an MPI rank that only encoded has nothing to say
        show_report(report)


def choose_tokenizer(
    tokenizer_type: TokenizerType,
    vocab_file: Path | None,
    merge_file: Path | None,
    tokenizer_model: Path | None,
) -> TokenizerDefinition:
    """The tokenizer that the flags name.

    Raises
    ------
    UsageError
        A flag that this type needs was not given.
    DataError
        A file is missing or is not what it should be.
    """
    from phi1_megatron.data import definition

    if tokenizer_type in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        if tokenizer_model is None:
            what = (
                "a folder that holds tokenizer.json"
                if tokenizer_type == "HuggingFaceTokenizer"
                else "a SentencePiece .model"
            )
            raise UsageError(f"{tokenizer_type} needs --tokenizer-model, {what}.")
        if tokenizer_type == "HuggingFaceTokenizer":
            return definition.load_definition(tokenizer_model)
        from phi1_megatron.data.sentencepiece_model import sentencepiece_definition

        return sentencepiece_definition(tokenizer_model)
    if vocab_file is None or merge_file is None:
        absent = "--vocab-file" if vocab_file is None else "--merge-file"
        raise UsageError(f"{tokenizer_type} needs {absent}: GPT-2's vocab.json and merges.txt.")
    if tokenizer_type == "CodeGenTokenizer":
        return definition.codegen_definition(vocab_file, merge_file)
    return definition.gpt2_definition(vocab_file, merge_file)


def choose_splitter(
    inputs: list[str], json_keys: tuple[str, ...], lang: str, keep_newlines: bool
) -> SentenceSplitter:
    """NLTK's Punkt for a language: as installed, or trained on the beginning of the input.

    Raises
    ------
    DataError
        NLTK is missing, or there is nothing to train on.
    UsageError
        It must be trained, and the input is standard input.
    """
    from phi1_megatron.data.documents import RowReader
    from phi1_megatron.data.inputs import STDIN
    from phi1_megatron.data.sentences import SentenceSplitter, installed_punkt, train_punkt

    params = installed_punkt(lang)
    if params is None:
        if STDIN in inputs:
            raise UsageError(
                f"NLTK's Punkt for {lang} is not installed and cannot be trained on standard "
                "input, which is read once; give a file, or install punkt_tab."
            )
        params = train_punkt(text for row in RowReader(inputs, json_keys) for text in row.texts)
    return SentenceSplitter(params, keep_newlines, whole_code=True)


def run_with_progress(
    work: Callable[[Callable[[int, int, int, int], None]], Report], log_interval: int = 1000
) -> Report:
    """Preprocess under a progress bar (plain lines where standard error is no terminal).

    ``work`` is given what to call with (bytes done, bytes in all, documents, tokens).
    """
    with ExitStack() as stack:
        show: Show | None = None
        started, next_line = time.monotonic(), log_interval
        plain = not sys.stderr.isatty()

        def on_progress(done: int, total: int, documents: int, tokens: int) -> None:
            nonlocal show, next_line
            if plain:
                if documents < next_line:
                    return
                next_line = documents + log_interval
            seconds = max(time.monotonic() - started, 1e-9)
            beside = f"{done / 1e6 / seconds:.1f} MB/s {short(tokens / seconds)} tokens/s"
            if plain:
                share = f"{done / total:4.0%}  " if total else ""
                print(
                    f"Tokenizing: {share}{documents:,} documents  {short(tokens)} tokens  {beside}",
                    file=sys.stderr,
                )
                return
            if show is None:  # not before the workers are forked: the bar is a thread
                from rich.console import Console

                from phi1_megatron.commands.progress import progress_bar

                show = stack.enter_context(progress_bar(Console(stderr=True), "Tokenizing"))
            show(done, total, beside)

        return work(on_progress)


def short(number: float) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M, 7.89G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def show_report(report: PreprocessReport) -> None:
    """Print what was written, and what deserves a second look, in at most 80 columns."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for prefix, dataset in zip(report.prefixes, report.datasets, strict=True):
        _show_dataset(prefix, dataset, console)
    first = report.datasets[0]
    if report.resumed_shards:
        console.print(
            f"[green]Resumed:[/] {report.resumed_shards:,} finished shards were there and used."
        )
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
    from rich.markup import escape

    seconds = max(dataset.seconds, 1e-9)
    speed = f"{dataset.text_bytes / 1e6 / seconds:.1f} MB/s, {short(dataset.tokens / seconds)}"
    checked = f"{dataset.checked_documents:,} documents compared with Hugging Face"
    console.print(f"[bold]{escape(str(prefix))}[/].bin, .idx, .report.json", soft_wrap=True)
    facts = {
        "documents": f"{dataset.documents:,} ({dataset.text_bytes / 1e6:,.1f} MB of text)",
        "tokens": f"{dataset.tokens:,} as {dataset.dtype}",
        "tokenizer": f"{dataset.tokenizer.name}, vocabulary {dataset.tokenizer.vocab_size:,}",
        "engine": f"{dataset.engine}, {checked}",
        "entropy": f"{dataset.unigram_entropy_nats:.3f} nats per token (unigram)",
        "time": f"{dataset.seconds:,.1f} s, {speed} tokens/s, {dataset.workers} workers",
    }
    if dataset.split_sentences:
        facts["tokens"] += f", {dataset.sequences:,} sentences"
    for name, value in facts.items():
        console.print(f"  {name:<10} {value}", highlight=False)
