"""What ``phi1 preprocess`` does with its flags; it runs where ``commands.runner`` says.

Nothing here loads the command line's libraries, so that the process that works need not have them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1_megatron.errors import UsageError

if TYPE_CHECKING:
    from phi1_megatron.commands.runner import OnProgress, Request, Work
    from phi1_megatron.data.definition import TokenizerDefinition
    from phi1_megatron.data.preprocess import PreprocessReport
    from phi1_megatron.data.report import DatasetReport
    from phi1_megatron.data.sentences import SentenceSplitter


def warm() -> Work:
    """Load what the work needs, before it is known what there is to do."""
    import fastokens  # noqa: F401 - most runs encode with it

    import phi1_megatron.data.preprocess  # noqa: F401

    return work


def work(request: Request, on_progress: OnProgress) -> list[str] | None:
    """Preprocess as the flags ask; gives the lines of the report, None on MPI ranks but the first.

    ``request`` holds the flags by name; see ``commands.preprocess``.
    """
    # Libraries' own threads would only get in the workers' way, and one thread can be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from phi1_megatron.data.mpi_pool import launched_tasks
    from phi1_megatron.data.preprocess import (
        PreprocessOptions,
        preprocess,
        preprocess_over_ranks,
    )

    definition = choose_tokenizer(
        request["tokenizer_type"],
        request["vocab_file"],
        request["merge_file"],
        request["tokenizer_model"],
    )
    splitter = None
    if request["split_sentences"]:
        splitter = choose_splitter(
            request["inputs"], request["json_keys"], request["lang"], request["keep_newlines"]
        )
    passed_on = ("inputs", "output_prefix", "append_eod", "json_keys", "workers", "strict")
    options: Any = {name: request[name] for name in (*passed_on, "engine", "max_line_bytes")}
    options = PreprocessOptions(
        tokenizer=replace(definition, literal_eod=request["literal_eod"]),
        splitter=splitter,
        **options,
    )
    over_ranks = launched_tasks()[0] > 1
    report = (preprocess_over_ranks if over_ranks else preprocess)(options, on_progress)
    return None if report is None else report_lines(report)


def choose_tokenizer(
    tokenizer_type: str,
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
    inputs: Sequence[str], json_keys: tuple[str, ...], lang: str, keep_newlines: bool
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


def report_lines(report: PreprocessReport) -> list[str]:
    """What was written, and what deserves a second look, as rich's markup."""
    lines: list[str] = []
    for prefix, dataset in zip(report.prefixes, report.datasets, strict=True):
        lines += _dataset_lines(prefix, dataset)
    first = report.datasets[0]
    if report.resumed_shards:
        lines.append(
            f"[green]Resumed:[/] {report.resumed_shards:,} finished shards were there and used."
        )
    if first.bad_rows:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in first.bad_rows.items())
        lines.append(
            f"[yellow]Rows set aside:[/] {counts}; listed in {_escaped(report.quarantine)}"
        )
    eod = first.tokenizer.eod_token
    if not first.append_eod:
        lines.append(
            f"[yellow]Documents do not end in {eod}:[/] a model cannot learn where one stops. "
            "Pre-training wants --append-eod."
        )
    literal = max(dataset.documents_with_literal_eod for dataset in report.datasets)
    if literal and first.literal_eod == "eod":
        lines.append(
            f"[yellow]{literal:,} documents hold a literal {eod}:[/] it became the "
            "end-of-document id, as in Megatron-LM. --literal-eod text keeps it text."
        )
    return lines


def _dataset_lines(prefix: Path, dataset: DatasetReport) -> list[str]:
    seconds = max(dataset.seconds, 1e-9)
    speed = f"{dataset.text_bytes / 1e6 / seconds:.1f} MB/s, {short(dataset.tokens / seconds)}"
    engine = dataset.engine
    if dataset.checked_documents:
        engine += f", {dataset.checked_documents:,} documents compared with Hugging Face"
    facts = {
        "documents": f"{dataset.documents:,} ({dataset.text_bytes / 1e6:,.1f} MB of text)",
        "tokens": f"{dataset.tokens:,} as {dataset.dtype}",
        "tokenizer": f"{_escaped(dataset.tokenizer.name)}, vocabulary "
        f"{dataset.tokenizer.vocab_size:,}",
        "engine": engine,
        "entropy": f"{dataset.unigram_entropy_nats:.3f} nats per token (unigram)",
        "time": f"{dataset.seconds:,.1f} s, {speed} tokens/s, {dataset.workers} workers",
    }
    if dataset.split_sentences:
        facts["tokens"] += f", {dataset.sequences:,} sentences"
    return [
        f"[bold]{_escaped(prefix)}[/].bin, .idx, .report.json",
        *(f"  {name:<10} {value}" for name, value in facts.items()),
    ]


def short(number: float) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M, 7.89G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _escaped(text: object) -> str:
    """rich.markup.escape, without loading rich beside the workers."""
    return re.sub(r"(\\*)(\[[a-z#/@])", r"\1\1\\\2", str(text))
