"""Damage to a data set is found and named: the chunk, the bytes, what to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi1_megatron.data.indexed import IndexedDatasetWriter
from phi1_megatron.data.report import Chunk, DatasetReport, TokenizerIdentity
from phi1_megatron.data.verify import verify
from phi1_megatron.errors import DataError

VOCAB = 500
TOKENS = 300


def write(prefix: Path, tokens: int = TOKENS, dtype: Any = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for start in range(0, tokens, 30):
            writer.add_document(np.arange(start, min(start + 30, tokens)) % VOCAB)
    return prefix


def report_of(prefix: Path, sizes: Sequence[int] = ()) -> DatasetReport:
    """A report whose checksums cover the .bin in chunks of these sizes, and the .idx."""
    data, chunks, at = Path(f"{prefix}.bin").read_bytes(), [], 0
    for size in sizes or [len(data)]:
        chunks.append(Chunk(size, xxhash.xxh3_128(data[at : at + size]).hexdigest()))
        at += size
    index = xxhash.xxh3_128(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    return DatasetReport(
        prefix=prefix.name,
        json_key="text",
        inputs={},
        tokenizer=TokenizerIdentity("duck", "f" * 64, VOCAB, 0, "<|endoftext|>"),
        dtype="uint16",
        append_eod=True,
        literal_eod="eod",
        documents=-(-TOKENS // 30),
        tokens=TOKENS,
        text_bytes=0,
        documents_with_literal_eod=0,
        unigram_entropy_nats=0.0,
        bad_rows={},
        quarantine=None,
        workers=1,
        seconds=0.0,
        chunks=tuple(chunks),
        idx_xxh3_128=index,
    )


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(autouse=True)
def _blocks_of_7_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi1_megatron.data.verify._CHUNK", 7)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.sets(st.integers(1, 2 * TOKENS - 1), max_size=12),
    at=st.integers(0, 2 * TOKENS - 1),
    bit=st.integers(0, 7),
)
def test_a_wrong_bit_anywhere_is_found_in_its_chunk(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], at: int, bit: int
) -> None:
    prefix = write(tmp_path_factory.mktemp("flip") / "a")
    bounds = [0, *sorted(cuts), 2 * TOKENS]
    report = report_of(prefix, [end - begin for begin, end in itertools.pairwise(bounds)])
    verify(prefix, VOCAB, report)
    flip(Path(f"{prefix}.bin"), at, bit)
    number = sum(bound <= at for bound in bounds)
    with pytest.raises(DataError) as raised:
        verify(prefix, VOCAB, report)
    message = str(raised.value)
    assert f"chunk {number} of {len(bounds) - 1}, " in message
    assert f"bytes {bounds[number - 1]} to {bounds[number] - 1}, " in message
    assert "preprocess again" in message


def test_every_wrong_byte_of_an_index_is_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    report, idx = report_of(prefix), Path(f"{prefix}.idx")
    for at in range(idx.stat().st_size):
        flip(idx, at)
        with pytest.raises(DataError, match=r"a\.(idx|bin)|holds"):
            verify(prefix, VOCAB, report)
        flip(idx, at)
    verify(prefix, VOCAB, report)


def test_chunks_that_do_not_add_up_to_the_file_are_refused_with_the_arithmetic(
    tmp_path: Path,
) -> None:
    prefix = write(tmp_path / "a")
    report = report_of(prefix, [400, 200])
    short = replace(report, chunks=report.chunks[:1])
    message = r"1 chunks that add up to 400 bytes, but .*a\.bin holds 600"
    with pytest.raises(DataError, match=message):
        verify(prefix, VOCAB, short)


def test_chunks_that_no_id_ends_with_and_empty_ones_are_read_all_the_same(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    verify(prefix, VOCAB, report_of(prefix, [0, 7, 0, 592, 1, 0]))


def test_a_wrong_id_under_right_checksums_is_not_called_damage(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    report = report_of(prefix, [100, 300, 200])
    with pytest.raises(DataError, match="token 120 is id 120, outside the vocabulary of 120"):
        verify(prefix, 120, report)


def test_counts_of_another_data_set_come_before_its_checksums(tmp_path: Path) -> None:
    report = report_of(write(tmp_path / "a"))
    write(tmp_path / "a", tokens=270)
    with pytest.raises(DataError, match="holds 9 documents and 270 tokens, but its report speaks"):
        verify(tmp_path / "a", VOCAB, report)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_without_checksums_structure_and_ids_are_checked(dtype: Any, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", dtype=dtype)
    assert verify(prefix, VOCAB).num_tokens == TOKENS
    old = replace(report_of(prefix), chunks=(), idx_xxh3_128=None)
    assert verify(prefix, VOCAB, old).num_documents == 10
    with pytest.raises(DataError, match="token 299 is id 299"):
        verify(prefix, 299, old)


def test_a_negative_id_is_outside_every_vocabulary(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", dtype=np.int32)
    flip(Path(f"{prefix}.bin"), 4 * 200 + 3, 7)
    with pytest.raises(DataError, match=r"token 200 is id -\d+, outside"):
        verify(prefix, VOCAB)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    prefix, seen = write(tmp_path / "a"), []
    verify(prefix, None, report_of(prefix), lambda done, total: seen.append((done, total)))
    assert seen == [(min(14 * n, 600), 600) for n in range(1, 44)]


def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, opened = write(tmp_path / "a"), Path.open

    def fail(path: Path, *args: Any) -> Any:
        if path.suffix == ".bin":
            raise OSError(5, "Input/output error")
        return opened(path, *args)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError, match=r"a\.bin could not be read: Input/output error"):
        verify(prefix, VOCAB)
