"""Our indexed data sets against megatron-core's own builder and reader, byte by byte."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi1_megatron.data.indexed import (
    IndexedDatasetWriter,
    TokenReader,
    best_dtype,
    merge,
    read_index,
)
from phi1_megatron.data.verify import verify
from phi1_megatron.errors import DataError, UsageError

# A document is a list of sequences.
documents_of = st.lists(
    st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=9), max_size=3), max_size=12
)
dtypes = st.sampled_from([np.uint16, np.int32])
per_example = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def write(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            joined = [token for sequence in document for token in sequence]
            writer.add_document(joined, [len(sequence) for sequence in document])
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: Any) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        joined = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(joined), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@per_example
@given(documents=documents_of, dtype=dtypes)
def test_the_bytes_are_those_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: Any
) -> None:
    folder = tmp_path_factory.mktemp("same")
    write(folder / "ours", documents, dtype)
    write_with_megatron(folder / "theirs", documents, dtype)
    assert contents(folder / "ours") == contents(folder / "theirs")


@per_example
@given(documents=documents_of.filter(any), dtype=dtypes)
def test_megatron_core_and_our_reader_give_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], dtype: Any
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write(tmp_path_factory.mktemp("read") / "a", documents, dtype)
    sequences = [sequence for document in documents for sequence in document]
    theirs = IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == sequences
    ours = TokenReader(prefix)
    assert [d.tolist() for d in ours] == [list(chain(*document)) for document in documents]
    assert ours.index.num_tokens == sum(map(len, sequences))
    assert ours.index.dtype == np.dtype(dtype)
    verify(prefix, vocab_size=65500)


@per_example
@given(parts=st.lists(documents_of, min_size=1, max_size=4), dtype=dtypes)
def test_merging_equals_writing_everything_at_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[list[int]]]], dtype: Any
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [write(folder / f"part{i}", part, dtype) for i, part in enumerate(parts)]
    index = merge(prefixes, folder / "merged")
    write(folder / "whole", [document for part in parts for document in part], dtype)
    assert contents(folder / "merged") == contents(folder / "whole")
    assert index.num_documents == sum(map(len, parts))


def test_documents_in_bulk_equal_documents_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "one", [[[1, 2, 3]], [[4]], [[5, 6]]])
    with IndexedDatasetWriter(tmp_path / "bulk", np.uint16) as writer:
        writer.add_documents(np.arange(1, 5), np.array([3, 1]))
        writer.add_documents(np.array([5, 6]), np.array([2]))
    assert contents(tmp_path / "bulk") == contents(tmp_path / "one")


def test_the_index_is_right_beyond_one_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi1_megatron.data.indexed._CHUNK", 3)
    monkeypatch.setattr("phi1_megatron.data.verify._CHUNK", 3)
    documents = [[list(range(n % 5 + 1))] for n in range(20)]
    write_with_megatron(tmp_path / "theirs", documents, np.int32)
    write(tmp_path / "ours", documents, np.int32)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    merge([tmp_path / "ours"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "theirs")
    verify(tmp_path / "merged", vocab_size=5)


@pytest.mark.parametrize("vocab_size", [1, 50295, 65499, 65500, 65536, 200_000])
def test_the_dtype_is_the_one_megatron_core_chooses(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert best_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"70000 do not fit uint16 \(0 to 65535\)"):
        write(tmp_path / "a", [[[1, 70_000]]])
    with pytest.raises(DataError, match="from -1 to 1"):
        write(tmp_path / "a", [[[1, -1]]])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_earlier_data_set_as_it_was(tmp_path: Path) -> None:
    before = contents(write(tmp_path / "a", [[[1, 2]]]))
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([3, 4, 5])
        raise KeyboardInterrupt
    assert contents(tmp_path / "a") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_data_set_is_not_visible_before_it_is_whole(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        assert not (tmp_path / "a.bin").exists()
        assert not (tmp_path / "a.idx").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_crash_between_the_renames_leaves_no_index_of_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", [[[1, 2]]])
    replace = Path.replace

    def crash_at_the_index(source: Path, target: Path) -> Path:
        if Path(target).suffix == ".idx":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", crash_at_the_index)
    with pytest.raises(DataError, match="could not be written: No space left"):
        write(tmp_path / "a", [[[3, 4]]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"a.bin.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match="No space left on device"):
        write(tmp_path / "out" / "a", [[[1] * 9000]] * 30)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bin_of_another_length_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    write(tmp_path / "corpus", [[list(range(600))]])
    data = tmp_path / "corpus.bin"
    for content in (data.read_bytes()[:1000], data.read_bytes() + b"\0\0"):
        data.write_bytes(content)
        message = (
            rf"corpus\.bin holds {len(content):,} bytes, but corpus\.idx describes 600 tokens "
            r"of 2 bytes = 1,200 bytes"
        )
        with pytest.raises(DataError, match=message):
            read_index(tmp_path / "corpus")
        data.write_bytes(np.arange(600, dtype=np.uint16).tobytes())
    read_index(tmp_path / "corpus")


def test_every_truncation_of_an_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2], [3]], [[4]]])
    idx = tmp_path / "a.idx"
    whole = idx.read_bytes()
    for size in range(len(whole)):
        idx.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.idx"):
            read_index(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b"X"), "its head is wrong"),
        ((9, b"\x02"), "version 2"),
        ((17, b"\x63"), "dtype code 99"),
        ((18, b"\xff\xff"), "describes 65,535 sequences"),
    ],
)
def test_a_damaged_head_is_named(tmp_path: Path, change: tuple[int, bytes], message: str) -> None:
    write(tmp_path / "a", [[[1, 2]]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[change[0] : change[0] + len(change[1])] = change[1]
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_index(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a", [[[1, 2]]])
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(DataError, match=rf"a\{suffix} does not exist"):
        read_index(tmp_path / "a")


def test_verify_finds_wrong_pointers_marks_and_ids(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[[1, 2]], [[3, 4000]], [[5]]])
    with pytest.raises(DataError, match="token 3 is id 4000, outside the vocabulary of 4,000"):
        verify(prefix, vocab_size=4000)
    whole = Path(f"{prefix}.idx").read_bytes()
    pointers, marks = 34 + 3 * 4, 34 + 3 * 12
    for at, message in ((pointers + 8, "sequence 1 does not begin"), (marks + 8, "marks")):
        content = bytearray(whole)
        content[at] = 99
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(DataError, match=message):
            verify(prefix)


def test_merging_refuses_other_dtypes_and_its_own_output(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [[[1]]]), write(tmp_path / "b", [[[1]]], np.int32)
    with pytest.raises(DataError, match=r"int32 and .* uint16"):
        merge([a, b], tmp_path / "c")
    with pytest.raises(UsageError, match="both an input and the output"):
        merge([a, a], a)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], tmp_path / "c")
    assert not (tmp_path / "c.bin").exists()
