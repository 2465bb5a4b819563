"""``phi1 data inspect|verify|merge|prepare``: look at, check, join and index data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from phi1_megatron.data.datasets import PreparedShare
    from phi1_megatron.data.report import DatasetReport
    from phi1_megatron.data.tokenizer import Tokenizer

_NOTHING_LEFT = "Nothing was left to do: every index was there."


def inspect(
    prefix: Path,
    /,
    *,
    tokenizer: Path | None = None,
    samples: Annotated[int, Parameter(validator=Number(gte=0))] = 3,
    document: Annotated[int | None, Parameter(validator=Number(gte=0))] = None,
) -> None:
    """Show what a data set holds: counts, document lengths, and documents token by token.

    Parameters
    ----------
    prefix
        The data set's path without .bin or .idx.
    tokenizer
        Folder of the tokenizer it was made with, to show text instead of ids.
    samples
        Documents to show the beginnings of, evenly spread.
    document
        Show this document alone, and all of it; the first is 0.
    """
    from rich.console import Console

    from phi1_megatron.commands.inspection import show_documents, show_facts, show_lengths
    from phi1_megatron.data.indexed import TokenReader
    from phi1_megatron.data.lengths import DocumentLengths
    from phi1_megatron.data.report import read_report
    from phi1_megatron.errors import UsageError

    reader, report = TokenReader(prefix), read_report(prefix)
    decoder = None if tokenizer is None else _tokenizer_of(prefix, report, tokenizer)
    if document is not None and document >= len(reader):
        raise UsageError(
            f"{prefix} has no document {document:,}: it holds {len(reader):,}, and the first is 0"
        )
    console = Console()
    if document is None:
        show_facts(reader, report, console)
        show_lengths(DocumentLengths(reader.index), console)
        shown = min(samples, len(reader))
        numbers = [place * (len(reader) - 1) // max(shown - 1, 1) for place in range(shown)]
    else:
        numbers = [document]
    show_documents(reader, numbers, decoder, console, whole=document is not None)


def _tokenizer_of(prefix: Path, report: DatasetReport | None, source: Path) -> Tokenizer:
    """The tokenizer in a folder or file, unless the data set was made with another."""
    from phi1_megatron.data.tokenizer import Tokenizer
    from phi1_megatron.errors import DataError

    given = Tokenizer.load(source)
    if report is None or given.fingerprint == report.tokenizer.fingerprint:
        return given
    # A folder may hold a SentencePiece model in both of its forms, which count as two tokenizers.
    model = source / "tokenizer.model"
    if model.is_file():
        of_model = Tokenizer.load(model)
        if of_model.fingerprint == report.tokenizer.fingerprint:
            return of_model
    raise DataError(
        f"{prefix} was made with tokenizer {report.tokenizer.name} "
        f"({report.tokenizer.fingerprint[:12]}), and {source} is {given.name} "
        f"({given.fingerprint[:12]}), which would show other text; give the one it was made with."
    )


def verify(
    prefix: Path,
    /,
    *,
    vocab_size: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
) -> None:
    """Check a data set through and through: structure, sizes, every id and every checksum.

    Parameters
    ----------
    prefix
        The data set's path without .bin or .idx.
    vocab_size
        Ids must lie below this; by default the vocabulary size of the data set's own report.
    """
    from rich.console import Console

    from phi1_megatron.commands.progress import progress_bar
    from phi1_megatron.data.report import read_report
    from phi1_megatron.data.verify import verify as verify_dataset

    report = read_report(prefix)
    if vocab_size is None and report is not None:
        vocab_size = report.tokenizer.vocab_size
    with progress_bar(Console(stderr=True), "Verifying") as show:
        index = verify_dataset(
            prefix,
            vocab_size,
            report,
            lambda done, total: show(done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"),
        )
    console = Console()
    console.print(f"[green]Sound:[/] [bold]{escape(str(prefix))}[/]", soft_wrap=True)
    ids = (
        "ids not checked: give --vocab-size" if vocab_size is None else f"ids below {vocab_size:,}"
    )
    console.print(
        f"  {index.num_documents:,} documents, {index.num_tokens:,} tokens, {ids}", highlight=False
    )
    console.print(f"  {_checksums(report)}", highlight=False)


def _checksums(report: DatasetReport | None) -> str:
    if report is None:
        return "no checksums: another tool made this data set"
    if not report.chunks:
        return "no checksums of the .bin: an older version made this data set"
    idx = "" if report.idx_xxh3_128 is None else " and of the .idx"
    return f"all checksums agree: of {len(report.chunks):,} chunks of the .bin{idx}"


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


def prepare(
    recipe: Path,
    /,
    *overrides: str,
    run_dir: Path | None = None,
) -> None:
    """Build the sample indices of a recipe's data, so that no rank waits for them in the run.

    A run with the same data section, seed and vocabulary finds them.

    Parameters
    ----------
    recipe
        A TOML file; examples/recipes/ holds ready ones.
    overrides
        section.field=value, laid over the recipe, as for phi1 train.
    run_dir
        Folder of the run; runs/RECIPE by default. With data.index_cache set, not used.
    """
    from rich.console import Console

    from phi1_megatron.config.load import load_recipe
    from phi1_megatron.data.datasets import check_data, index_cache, prepare_data

    config = load_recipe(recipe, overrides)
    folder = run_dir or Path("runs") / recipe.stem
    check_data(config)
    console = Console()
    console.print(f"Sample indices in [bold]{escape(str(index_cache(config, folder)))}[/]")

    def announce(name: str, prefix: str) -> None:
        console.print(f"{name} [bold]{escape(prefix)}[/]", highlight=False, soft_wrap=True)

    built = 0
    for share in prepare_data(config, folder, announce):
        _show_share(share, console)
        built += share.built
    done = f"{built} built: a run of this recipe finds them all." if built else _NOTHING_LEFT
    console.print(done, highlight=False)


def _show_share(share: PreparedShare, console: Console) -> None:
    taker = "the run" if share.name == "training" else "a validation"
    size = sum(file.stat().st_size for file in share.files) / 1e6
    for name, value in {
        "samples": f"{share.samples:,} an epoch; {taker} takes {share.taken:,.0f} = "
        f"{share.taken / share.samples:,.2f} epochs",
        "index": f"{'built' if share.built else 'was there'}, {size:,.2f} MB in "
        f"{len(share.files)} files",
    }.items():
        console.print(f"  {name:<8} {value}", highlight=False)
