"""The reading benchmark: what it measures is what training reads, and it is fast enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi1_megatron.benchmark.reading import (
    PairedSpeeds,
    ReadingMeasurement,
    benchmark_read_text,
    measure_reading,
)
from phi1_megatron.data.indexed import IndexedDatasetWriter
from phi1_megatron.data.samples import PackedSamples
from phi1_megatron.errors import DataError


def write(prefix: Path, documents: int, mean: int, dtype: Any = np.uint16) -> Path:
    generator = np.random.default_rng(1)
    lengths = generator.geometric(1 / mean, documents)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        ids = generator.integers(0, 50_000, int(lengths.sum()))
        writer.add_documents(ids.astype(dtype), lengths)
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_small_data_set_is_read_over_and_over_by_both_in_turns(
    dtype: Any, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "a", 40, 20, dtype)
    measured = measure_reading(prefix, seq_length=32, samples=100, repeats=3)
    assert measured.samples == 104  # whole micro batches
    assert (measured.documents, measured.dtype) == (40, np.dtype(dtype).name)
    for speeds in (measured.data_set, measured.loader):
        assert len(speeds.theirs) == len(speeds.ours) == 3
        assert min(speeds.theirs + speeds.ours) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_the_ratio_is_the_median_of_pairs_not_of_all() -> None:
    assert PairedSpeeds(theirs=(1.0, 10.0, 100.0), ours=(8.0, 20.0, 300.0)).ratio == 3.0


def test_samples_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PackedSamples.read

    def one_wrong(self: PackedSamples, index: int, tokens: Any, labels: Any) -> None:
        read(self, index, tokens, labels)
        labels[-1] += 1

    monkeypatch.setattr(PackedSamples, "read", one_wrong)
    with pytest.raises(AssertionError, match="labels of sample"):
        measure_reading(write(tmp_path / "a", 40, 20), seq_length=32, samples=8, repeats=1)


def test_a_data_set_too_short_for_a_sample_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too small for one sample of 2048 \+ 1"):
        measure_reading(write(tmp_path / "a", 3, 20))


def test_the_text_says_who_is_how_fast_within_80_columns() -> None:
    speeds = PairedSpeeds((29_000.0, 30_000.0, 31_000.0), (240_000.0, 250_000.0, 300_000.0))
    measured = ReadingMeasurement(
        prefix="data/mine_text_document",
        dtype="uint16",
        documents=17_921,
        tokens=128_850_000,
        seq_length=2048,
        samples=8192,
        micro_batch=8,
        data_set=speeds,
        loader=speeds,
    )
    lines = benchmark_read_text(measured).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["through", "the", "loader", "30,000", "250,000", "8.3x"]


def test_samples_are_served_at_least_four_times_as_fast_as_megatron_core_serves_them(
    tmp_path: Path,
) -> None:
    # In turns on the same machine, so that other work on it slows both; it is 6 to 12 times.
    measured = measure_reading(write(tmp_path / "a", 3000, 5000), samples=2048, repeats=7)
    assert measured.data_set.ratio >= 4, measured
