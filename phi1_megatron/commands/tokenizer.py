"""``phi1 tokenizer train``: a tokenizer of one's own corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape


def train(
    inputs: Annotated[list[str], Parameter(name="INPUT")],
    /,
    *,
    output: Path,
    vocab_size: int,
    type: Literal["bpe", "sentencepiece"] = "bpe",
    json_key: str = "text",
    strict: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a tokenizer with CodeGen's whitespace tokens and <|endoftext|>.

    Every text comes back from its ids, byte for byte. OUTPUT becomes a folder that
    transformers.AutoTokenizer opens too.

    Parameters
    ----------
    inputs
        Files, folders, quoted patterns, or - for standard input: JSONL, plain or compressed, and
        parquet.
    output
        Folder to write: tokenizer.json and its two companions, and tokenizer.model where it is a
        SentencePiece model.
    vocab_size
        Total size, added tokens and bytes included; at least 295, for sentencepiece 296 and the
        characters of the corpus.
    type
        bpe is byte-level BPE, as GPT-2's and CodeGen's; sentencepiece is SentencePiece's BPE over
        characters, with bytes for rare ones, which learns from an even sample of up to 67 million
        characters.
    json_key
        Field that holds the text.
    strict
        Stop at the first bad row instead of passing over it.
    """
    from rich.console import Console

    from phi1_megatron.commands.interruption import terminating_as_interrupt
    from phi1_megatron.commands.progress import progress_bar
    from phi1_megatron.data.documents import BadRows, RowReader
    from phi1_megatron.data.sentencepiece_training import train_sentencepiece
    from phi1_megatron.data.tokenizer import Tokenizer, train_bpe

    console = Console()
    bad_rows = BadRows(strict=strict)
    reader = RowReader(inputs, (json_key,), bad_rows)
    name = output.resolve().name
    with (
        terminating_as_interrupt(),
        progress_bar(Console(stderr=True), "Training the tokenizer") as show,
    ):

        def on_progress(characters: int, documents: int) -> None:
            done = reader.bytes_done
            beside = "merging" if done and done == reader.bytes_total else f"{documents:,} texts"
            show(done, reader.bytes_total, beside)

        texts = (row.texts[0] for row in reader)
        if type == "bpe":
            tokenizer = train_bpe(texts, vocab_size, name, on_progress)
        else:
            definition = train_sentencepiece(texts, vocab_size, name=name, on_progress=on_progress)
            tokenizer = Tokenizer(definition)
        tokenizer.save(output)
    console.print(f"[bold]{escape(str(output))}[/]", soft_wrap=True)
    console.print(f"  vocabulary {tokenizer.vocab_size:,}", highlight=False)
    console.print(f"  end id     {tokenizer.eod_id:,} {tokenizer.eod_token}", highlight=False)
    if tokenizer.vocab_size < vocab_size:
        console.print(
            f"[yellow]The corpus had merges for {tokenizer.vocab_size:,} ids only,[/] not for "
            f"{vocab_size:,}; set the model's vocabulary accordingly."
        )
    if bad_rows.total:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in bad_rows.counts.items())
        console.print(f"[yellow]Rows passed over:[/] {counts}")
