"""``phi1 data inspect|verify|merge``: look at, check and join indexed data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from phi1_megatron.data.indexed import TokenReader
    from phi1_megatron.data.tokenizer import Tokenizer


def inspect(prefix: Path, /, *, tokenizer: Path | None = None, samples: int = 3) -> None:
    """Show what a data set holds: counts, document lengths and the first documents.

    Parameters
    ----------
    prefix
        The data set's path without .bin or .idx.
    tokenizer
        Folder of the tokenizer it was made with, to show text instead of ids.
    samples
        Documents to show.
    """
    from rich.console import Console

    from phi1_megatron.data.indexed import TokenReader
    from phi1_megatron.data.report import read_report
    from phi1_megatron.data.tokenizer import Tokenizer

    console = Console()
    reader = TokenReader(prefix)
    report = read_report(prefix)
    decoder = None if tokenizer is None else Tokenizer.load(tokenizer)
    index = reader.index
    facts = {
        "documents": f"{index.num_documents:,}",
        "sequences": f"{index.num_sequences:,}",
        "tokens": f"{index.num_tokens:,} as {index.dtype}",
        "size": f"{index.num_tokens * index.dtype.itemsize / 1e6:,.1f} MB",
    }
    if report is not None:
        facts["tokenizer"] = (
            f"{report.tokenizer.name}, vocabulary {report.tokenizer.vocab_size:,}, "
            f"end id {report.tokenizer.eod_id:,}"
        )
        facts["entropy"] = f"{report.unigram_entropy_nats:.3f} nats per token (unigram)"
    console.print(f"[bold]{escape(str(prefix))}[/]", soft_wrap=True)
    for name, value in facts.items():
        console.print(f"  {name:<10} {value}", highlight=False)
    _show_lengths(reader, console)
    for number in range(min(samples, len(reader))):
        _show_document(reader, number, decoder, console)


def verify(prefix: Path, /, *, vocab_size: int | None = None) -> None:
    """Check a data set through and through: structure, sizes, and every id.

    Parameters
    ----------
    prefix
        The data set's path without .bin or .idx.
    vocab_size
        Ids must lie below this; by default the vocabulary size of the data set's own report.
    """
    from rich.console import Console

    from phi1_megatron.data.report import read_report
    from phi1_megatron.data.verify import verify as verify_dataset
    from phi1_megatron.errors import DataError

    report = read_report(prefix)
    if vocab_size is None and report is not None:
        vocab_size = report.tokenizer.vocab_size
    index = verify_dataset(prefix, vocab_size)
    if report is not None and (report.documents, report.tokens) != (
        index.num_documents,
        index.num_tokens,
    ):
        raise DataError(
            f"{prefix} holds {index.num_documents:,} documents and {index.num_tokens:,} tokens, "
            f"but its report speaks of {report.documents:,} and {report.tokens:,}; preprocess it "
            "again."
        )
    ids = (
        "ids not checked: give --vocab-size" if vocab_size is None else f"ids below {vocab_size:,}"
    )
    console = Console()
    console.print(f"[green]Sound:[/] [bold]{escape(str(prefix))}[/]", soft_wrap=True)
    console.print(
        f"  {index.num_documents:,} documents, {index.num_tokens:,} tokens, {ids}", highlight=False
    )


def merge(
    prefixes: Annotated[list[Path], Parameter(name="PREFIX")], /, *, output_prefix: Path
) -> None:
    """Join data sets of one tokenizer, in the order given, into a new one.

    Parameters
    ----------
    prefixes
        The data sets' paths without .bin or .idx.
    output_prefix
        Path of the new data set, without .bin or .idx.
    """
    from rich.console import Console

    from phi1_megatron.commands.interruption import terminating_as_interrupt
    from phi1_megatron.commands.progress import progress_bar
    from phi1_megatron.data.indexed import merge as merge_datasets
    from phi1_megatron.data.report import (
        check_same_tokenizer,
        merged_report,
        report_path,
        write_report,
    )

    check_same_tokenizer(prefixes)
    with (
        terminating_as_interrupt(),
        progress_bar(Console(stderr=True), "Merging") as show,
    ):
        index = merge_datasets(
            prefixes,
            output_prefix,
            lambda done, total: show(done, total, f"{done / 1e6:,.0f} MB"),
        )
        report_path(output_prefix).unlink(missing_ok=True)  # of a data set now replaced
        report = merged_report(prefixes, output_prefix)
        if report is not None:
            write_report(output_prefix, report)
    console = Console()
    console.print(f"[bold]{escape(str(output_prefix))}[/].bin, .idx", soft_wrap=True)
    console.print(
        f"  {index.num_documents:,} documents, {index.num_tokens:,} tokens", highlight=False
    )


def _show_lengths(reader: TokenReader, console: Console) -> None:
    """A histogram of document lengths in powers of two."""
    import numpy as np

    lengths = np.asarray([document.size for document in reader], np.int64)
    if lengths.size == 0:
        return
    buckets = np.bincount([int(length).bit_length() for length in lengths])
    console.print("  tokens in a document:")
    for bits, count in enumerate(buckets):
        if count:
            low, high = (1 << bits) >> 1, (1 << bits) - 1
            bar = "█" * max(1, round(30 * count / buckets.max()))
            console.print(f"  {low:>11,} to {high:>11,} {count:>11,} {bar}", highlight=False)


def _show_document(
    reader: TokenReader, number: int, decoder: Tokenizer | None, console: Console
) -> None:
    ids = reader.document(number)
    first = ids[:48].tolist()
    console.print(f"document {number:,}, {ids.size:,} tokens", style="bold", highlight=False)
    if decoder is None:
        shown = " ".join(map(str, first))
    else:
        shown = "·".join(decoder.decode([token]) for token in first)
    console.print(shown + (" ..." if ids.size > len(first) else ""), markup=False, highlight=False)
