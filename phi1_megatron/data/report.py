"""What is known of a data set beside its tokens: ``PREFIX.report.json``.

Preprocessing writes it; training reads it to see that vocabulary and end-of-document token are the
model's, and what loss a model that knows nothing but frequencies would have; ``verify`` reads it
for the checksums.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from phi1_megatron.data.indexed import read_index
from phi1_megatron.errors import DataError

if TYPE_CHECKING:
    from phi1_megatron.data.definition import TokenizerDefinition

_REPORT_FORMAT = 2
_CHUNK = 1 << 20  # tokens counted, or bytes read, at a time
_SAMPLED_TOKENS = 8 << 20


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """Enough of a tokenizer to tell whether a model and a data set belong together."""

    name: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    eod_token: str

    @classmethod
    def of(cls, definition: TokenizerDefinition) -> TokenizerIdentity:
        """What a report keeps of a tokenizer's definition."""
        return cls(
            name=definition.name,
            fingerprint=definition.fingerprint,
            vocab_size=definition.vocab_size,
            eod_id=definition.eod_id,
            eod_token=definition.eod_token,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of the .bin and its checksum; a data set is its chunks, one after the other."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """One data set, as ``PREFIX.report.json`` keeps it; :func:`read_report` reads it back.

    Attributes
    ----------
    prefix
        Name of the data set without folder or suffix.
    inputs
        Size in bytes of each input file (standard input: of what was read).
    input_hashes
        XXH3-128 of each input, over the digests of the stretches it was read in.
    text_bytes
        UTF-8 bytes of the documents' text.
    bad_rows
        Rows set aside, by reason; ``quarantine`` names the file that lists them.
    documents_with_literal_eod
        Documents whose text holds the end-of-document token's text.
    unigram_entropy_nats
        Entropy of the token frequencies, nats a token: the loss of a model
        that knows the frequencies and nothing else. Large inputs are sampled evenly for it.
    engine
        Library and version that encoded.
    checked_documents
        Documents whose ids were compared with Hugging Face's during the run.
    chunks
        The .bin in stretches with their XXH3-128; empty where they are not known.
    idx_xxh3_128
        XXH3-128 of the .idx.
    """

    prefix: str
    json_key: str
    inputs: dict[str, int]
    tokenizer: TokenizerIdentity
    dtype: str
    append_eod: bool
    literal_eod: Literal["eod", "text"]
    documents: int
    tokens: int
    text_bytes: int
    documents_with_literal_eod: int
    unigram_entropy_nats: float
    bad_rows: dict[str, int]
    quarantine: str | None
    workers: int
    seconds: float
    sequences: int = 0
    split_sentences: bool = False
    engine: str = ""
    checked_documents: int = 0
    input_hashes: dict[str, str] = field(default_factory=dict)
    chunks: tuple[Chunk, ...] = ()
    idx_xxh3_128: str | None = None
    format: int = _REPORT_FORMAT


def report_path(prefix: str | Path) -> Path:
    """Where the report of the data set ``prefix`` lies."""
    prefix = Path(prefix)
    return prefix.with_name(f"{prefix.name}.report.json")


def read_report(prefix: str | Path) -> DatasetReport | None:
    """The report beside a data set; None where another tool wrote the data set.

    Raises
    ------
    DataError
        The report is not one of ours.
    """
    path = report_path(prefix)
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=DatasetReport)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is not a report of phi1 preprocess: {error}.") from error


def check_same_tokenizer(prefixes: Iterable[str | Path]) -> None:
    """Refuse data sets whose reports name different tokenizers; those without one pass.

    Raises
    ------
    DataError
        Two reports differ.
    """
    reports = [(prefix, read_report(prefix)) for prefix in prefixes]
    known = [(prefix, report.tokenizer) for prefix, report in reports if report is not None]
    for prefix, tokenizer in known:
        if tokenizer.fingerprint != known[0][1].fingerprint:
            raise DataError(
                f"{prefix} was made with tokenizer {tokenizer.name} "
                f"({tokenizer.fingerprint[:12]}), {known[0][0]} with {known[0][1].name} "
                f"({known[0][1].fingerprint[:12]}); their ids mean different things."
            )


def entropy_nats(counts: npt.NDArray[np.int64]) -> float:
    """Entropy, in nats, of the frequencies ``counts`` [vocabulary]."""
    present = counts[counts > 0].astype(np.float64)
    if present.size == 0:
        return 0.0
    shares = present / present.sum()
    return float(-(shares * np.log(shares)).sum())


def sampled_entropy_nats(data: Path, dtype: np.dtype[Any], vocab_size: int) -> float:
    """:func:`entropy_nats` of a .bin's tokens: of all of them up to 8 million, else of as many in
    64 evenly spread stretches, which is within about 0.01 nats of the whole."""
    tokens = np.memmap(data, dtype, "r")
    size, stretches = len(tokens), 64
    if size <= _SAMPLED_TOKENS:
        starts, length = list(range(0, size, _CHUNK)), _CHUNK
    else:
        length = _SAMPLED_TOKENS // stretches
        starts = [i * (size - length) // (stretches - 1) for i in range(stretches)]
    counts = np.zeros(vocab_size, np.int64)
    for start in starts:
        counts += np.bincount(tokens[start : start + length], minlength=vocab_size)
    return entropy_nats(counts)


def merged_report(
    prefixes: Sequence[str | Path], output_prefix: str | Path
) -> DatasetReport | None:
    """The report of a data set merged from others, whose tokens it counts again.

    None where one of the parts has no report, so that the tokenizer is not known for sure.
    """
    parts = [read_report(prefix) for prefix in prefixes]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    index = read_index(output_prefix)
    vocab_size = known[0].tokenizer.vocab_size
    entropy = sampled_entropy_nats(index.bin_path, index.dtype, vocab_size)
    bad_rows: Counter[str] = Counter()
    for part in known:
        bad_rows.update(part.bad_rows)
    return DatasetReport(
        prefix=Path(output_prefix).name,
        json_key=known[0].json_key,
        inputs={name: size for part in known for name, size in part.inputs.items()},
        tokenizer=known[0].tokenizer,
        dtype=known[0].dtype,
        append_eod=all(part.append_eod for part in known),
        literal_eod=known[0].literal_eod,
        documents=sum(part.documents for part in known),
        tokens=sum(part.tokens for part in known),
        text_bytes=sum(part.text_bytes for part in known),
        documents_with_literal_eod=sum(part.documents_with_literal_eod for part in known),
        unigram_entropy_nats=entropy,
        bad_rows=dict(sorted(bad_rows.items())),
        quarantine=None,
        workers=max(part.workers for part in known),
        seconds=sum(part.seconds for part in known),
        sequences=sum(part.sequences for part in known),
        split_sentences=any(part.split_sentences for part in known),
        engine=", ".join(dict.fromkeys(part.engine for part in known)),
        checked_documents=sum(part.checked_documents for part in known),
        input_hashes={n: h for part in known for n, h in part.input_hashes.items()},
        chunks=(
            tuple(chunk for part in known for chunk in part.chunks)
            if all(part.chunks for part in known)
            else ()
        ),
        idx_xxh3_128=file_hash(index.idx_path),
    )


def file_hash(path: Path) -> str:
    """XXH3-128 of a file, as hexadecimal digits; the file is streamed."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def report_bytes(report: DatasetReport) -> bytes:
    """The text of a report's file."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def write_report(prefix: Path, report: DatasetReport) -> None:
    """Write ``report`` beside its data set, whole or not at all."""
    path = report_path(prefix)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(report_bytes(report))
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
