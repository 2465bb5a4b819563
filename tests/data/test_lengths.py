"""Document lengths counted from the index, against numpy over the documents themselves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi1_megatron.data.indexed import IndexedDatasetWriter, TokenReader, read_index
from phi1_megatron.data.lengths import DocumentLengths
from phi1_megatron.errors import DataError

SHARES = [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0]

documents_of = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=50)


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for lengths in documents:
            writer.add_document(np.ones(sum(lengths), np.uint16), lengths)
    return prefix


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents=documents_of)
def test_quantiles_and_histogram_are_those_of_the_documents(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    documents: list[list[int]],
) -> None:
    # Several chunks, and lengths on both sides of the limit up to which they are counted.
    monkeypatch.setattr("phi1_megatron.data.lengths._CHUNK", 7)
    monkeypatch.setattr("phi1_megatron.data.lengths._LIMIT", 32)
    prefix = write(tmp_path_factory.mktemp("lengths") / "a", documents)
    expected = [document.size for document in TokenReader(prefix)]
    lengths = DocumentLengths(read_index(prefix))
    quantiles = np.quantile(expected, SHARES, method="inverted_cdf")
    assert lengths.quantiles(SHARES) == quantiles.tolist()
    buckets = lengths.histogram()
    for bucket in buckets:
        inside = [length for length in expected if bucket.low <= length <= bucket.high]
        assert bucket.documents == len(inside), bucket
    assert sum(bucket.documents for bucket in buckets) == lengths.documents == len(expected)
    for one, after in itertools.pairwise(buckets):
        assert after.low == one.high + 1


def test_a_data_set_without_documents_has_no_lengths(tmp_path: Path) -> None:
    lengths = DocumentLengths(read_index(write(tmp_path / "a", [])))
    assert lengths.quantiles(SHARES) == []
    assert lengths.histogram() == []


def test_marks_that_point_nowhere_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[3], [4], [5]])
    idx = Path(f"{prefix}.idx")
    content = bytearray(idx.read_bytes())
    content[34 + 3 * 12 + 8] = 99
    idx.write_bytes(content)
    with pytest.raises(DataError, match=r"documents 0 and up .*phi1 data verify"):
        DocumentLengths(read_index(prefix))
