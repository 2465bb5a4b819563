"""What ``phi1 data inspect`` shows of a data set: counts, lengths, documents token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.markup import escape
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from phi1_megatron.data.indexed import TokenReader
    from phi1_megatron.data.lengths import DocumentLengths
    from phi1_megatron.data.pieces import Decoder
    from phi1_megatron.data.report import DatasetReport

_INDENT = "  "
_BOUNDARY = "│"
_QUANTILES = {
    "shortest": 0.0,
    "10%": 0.1,
    "median": 0.5,
    "90%": 0.9,
    "99%": 0.99,
    "longest": 1.0,
}
_BAR = 30
_SHOWN_TOKENS = 96
"""Of a document that is not shown whole; about ten lines of code."""


def show_facts(reader: TokenReader, report: DatasetReport | None, console: Console) -> None:
    """Counts, and what the report says."""
    index = reader.index
    facts = {
        "documents": f"{index.num_documents:,}",
        "sequences": f"{index.num_sequences:,}",
        "tokens": f"{index.num_tokens:,} as {index.dtype}, "
        f"{index.num_tokens * index.dtype.itemsize / 1e6:,.1f} MB",
    }
    if report is None:
        facts["report"] = "none: another tool made this data set"
    else:
        facts["tokenizer"] = (
            f"{report.tokenizer.name}, vocabulary {report.tokenizer.vocab_size:,}, "
            f"end id {report.tokenizer.eod_id:,}"
        )
        facts["entropy"] = f"{report.unigram_entropy_nats:.3f} nats per token (unigram)"
        if report.bad_rows:
            bad = ", ".join(f"{count:,} {reason}" for reason, count in report.bad_rows.items())
            facts["set aside"] = bad
    console.print(f"[bold]{escape(str(index.prefix))}[/]", soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{_INDENT}{name:<10} {escape(value)}", highlight=False)


def show_lengths(lengths: DocumentLengths, console: Console) -> None:
    """Quantiles and a histogram of the documents' lengths."""
    if not lengths.documents:
        return
    console.print("\ntokens in a document", style="bold")
    found = lengths.quantiles(list(_QUANTILES.values()))
    shown = {name: f"{length:,}" for name, length in zip(_QUANTILES, found, strict=True)}
    shown["mean"] = f"{lengths.tokens / lengths.documents:,.1f}"
    widths = [max(len(name), len(value)) for name, value in shown.items()]
    for row in (shown.keys(), shown.values()):
        cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        console.print(_INDENT + "  ".join(cells), highlight=False, soft_wrap=True)
    buckets = lengths.histogram()
    most = max(bucket.documents for bucket in buckets)
    width = max(len(f"{buckets[-1].high:,}"), len("tokens"))
    counts = max(len(f"{most:,}"), len("documents"))
    heading = f"{'tokens':>{2 * width + 4}}  {'documents':>{counts}}"
    console.print(f"\n{_INDENT}{heading}", highlight=False)
    for bucket in buckets:
        bar = "█" * max(round(_BAR * bucket.documents / most), min(bucket.documents, 1))
        span = f"{bucket.low:>{width},} to {bucket.high:>{width},}"
        line = f"{_INDENT}{span}  {bucket.documents:>{counts},} {bar}"
        console.print(line.rstrip(), highlight=False)


def show_documents(
    reader: TokenReader,
    numbers: Sequence[int],
    decoder: Decoder | None,
    console: Console,
    *,
    whole: bool,
) -> None:
    """Documents, or their beginnings, each token seen from where to where it goes."""
    if decoder is not None and numbers:
        console.print("\n│ ends a token, ⏎ is a line's end, → a tab", style="dim")
    width = max(console.width - len(_INDENT), 20)
    for number in numbers:
        first, end = reader.index.document_indices[number : number + 2].tolist()
        ids = reader.document(number)
        shown = ids if whole else ids[:_SHOWN_TOKENS]
        title = f"\ndocument {number:,} of {len(reader):,}: {ids.size:,} tokens"
        if end - first != 1:
            title += f" in {end - first:,} sequences"
        if shown.size < ids.size:
            title += f", the first {shown.size:,}"
        console.print(title, style="bold", highlight=False)
        for line in _lines(_cells(shown.tolist(), decoder), width, _BOUNDARY if decoder else " "):
            text = Text(_INDENT + (line if decoder else line.rstrip()))
            text.highlight_regex(_BOUNDARY, "dim")
            console.print(text, soft_wrap=True)


def _cells(ids: Iterable[int], decoder: Decoder | None) -> Iterable[str]:
    """What stands between two boundaries: a token's text, or without a tokenizer its number."""
    if decoder is None:
        yield from map(str, ids)
        return
    from phi1_megatron.data.pieces import pieces, visible

    for piece in pieces(ids, decoder):
        spread = f"⟨{piece.tokens} tokens⟩" if piece.tokens > 1 else ""
        yield visible(piece.text) + spread


def _lines(cells: Iterable[str], width: int, boundary: str) -> Iterable[str]:
    """Cells in lines of at most ``width`` columns, broken where the text breaks its own."""
    line = ""
    for cell in cells:
        for part in chop_cells(cell, width - 1):
            if cell_len(line) + cell_len(part) + 1 > width:
                yield line
                line = ""
            line += part
        line += boundary
        if cell.endswith("⏎"):
            yield line
            line = ""
    if line:
        yield line
