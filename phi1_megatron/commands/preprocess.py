"""``phi1 preprocess``: documents to an indexed data set, with Megatron-LM's flag names."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar

from cyclopts import Parameter

from phi1_megatron.errors import UsageError

if TYPE_CHECKING:
    from phi1_megatron.commands.progress import Show

TokenizerType: TypeAlias = Literal[
    "CodeGenTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"
]
Result = TypeVar("Result")

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
    from phi1_megatron.commands import runner
    from phi1_megatron.commands.interruption import terminating_as_interrupt
    from phi1_megatron.commands.preprocessing import work

    if partitions < 1 or log_interval < 1:
        raise UsageError(
            f"--partitions {partitions} and --log-interval {log_interval} must be 1 or more."
        )
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot encode; give 1 or more.")
    request = {
        "inputs": tuple(input),
        "output_prefix": output_prefix,
        "tokenizer_type": tokenizer_type,
        "vocab_file": vocab_file,
        "merge_file": merge_file,
        "tokenizer_model": tokenizer_model,
        "literal_eod": literal_eod,
        "append_eod": append_eod,
        "json_keys": json_keys,
        "split_sentences": split_sentences,
        "keep_newlines": keep_newlines,
        "lang": lang,
        "workers": workers,
        "strict": strict,
        "engine": engine,
        "max_line_bytes": max_line_bytes,
    }
    started = runner.take()
    perform = work if started is None else started.run
    with terminating_as_interrupt():
        lines = run_with_progress(lambda show: perform(request, show), log_interval)
    if lines is not None:  # an MPI rank that only encoded has nothing to say
        show_lines(lines)


def run_with_progress(
    work: Callable[[Callable[[int, int, int, int], None]], Result], log_interval: int = 1000
) -> Result:
    """Preprocess under a progress bar (plain lines where standard error is no terminal).

    ``work`` is given what to call with (bytes done, bytes in all, documents, tokens).
    """
    from phi1_megatron.commands.preprocessing import short

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


def show_lines(lines: Sequence[str]) -> None:
    """Print a report's lines, in at most 80 columns but for paths."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=line.startswith("[bold]"))
