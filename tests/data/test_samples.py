"""Our samples against megatron-core's ``GPTDataset``, tensor by tensor."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from phi1_megatron.data.indexed import IndexedDatasetWriter, TokenReader
from phi1_megatron.data.sample_index import gpt_dataset_config
from phi1_megatron.data.samples import PackedSamples
from tests.training.toy_data import toy_config

WHOLE = [1.0, 0.0, 0.0]


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> str:
    """Documents given as the lengths of their sequences; ids count up, so that each is telling."""
    vocab, at = (65_000 if dtype == np.uint16 else 1_000_000), 0
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for lengths in documents:
            ids = (np.arange(at, at + sum(lengths)) * 7919) % vocab
            writer.add_document(ids.astype(dtype), lengths)
            at += sum(lengths)
    return str(prefix)


def both(
    prefix: str, seq_length: int, folder: Path, split: Sequence[float] = WHOLE, place: int = 0
) -> tuple[Any, PackedSamples]:
    """megatron-core's data set as its own builder makes it, and ours over the same index."""
    config = toy_config(
        prefix, data={"seq_length": seq_length}, model={"max_position_embeddings": seq_length}
    )
    built = BlendedMegatronDatasetBuilder(
        GPTDataset, [None] * 3, lambda: True, gpt_dataset_config(config, prefix, split, folder)
    ).build()[place]
    index = built.document_index, built.sample_index, built.shuffle_index
    return built, PackedSamples(TokenReader(prefix), seq_length, *index)


def assert_same_samples(theirs: Any, ours: PackedSamples) -> None:
    assert len(ours) == len(theirs) > 0
    for number in range(len(theirs)):
        expected, got = theirs[number], ours[number]
        assert list(got) == list(expected)
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), f"{name} of sample {number}"


@pytest.mark.parametrize("few", [0, 8, 1000], ids=["gathered", "either", "one by one"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([[n % 4 + 1] for n in range(300)], id="many tiny documents"),
        pytest.param([[5000]], id="one huge document"),
        pytest.param([[20 + 37 * n % 90] for n in range(40)], id="neighbours"),
        pytest.param([[3, 40, 1], [17], [9, 9], [64, 2]] * 8, id="several sequences each"),
        pytest.param([[0, 30], [0], [45, 0, 0], [1]] * 9, id="sequences of no tokens"),
    ],
)
def test_every_sample_is_that_of_megatron_core(
    documents: list[list[int]],
    dtype: Any,
    few: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phi1_megatron.data.samples._FEW_PARTS", few)
    theirs, ours = both(write(tmp_path / "a", documents, dtype), 32, tmp_path / "cache")
    assert_same_samples(theirs, ours)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    documents=st.lists(
        st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=1, max_size=60
    ).filter(lambda documents: sum(map(sum, documents)) > 9),
    seq_length=st.integers(2, 9),
)
def test_any_documents_and_any_length_give_the_samples_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_length: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert_same_samples(*both(write(folder / "a", documents), seq_length, folder / "cache"))


@pytest.mark.parametrize("place", [0, 1])
def test_a_share_of_the_documents_gives_the_samples_of_megatron_core(
    place: int, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "a", [[25 + n] for n in range(60)])
    assert_same_samples(*both(prefix, 16, tmp_path / "cache", [70.0, 20.0, 10.0], place))


def test_an_index_read_from_the_cache_gives_what_it_gave_when_it_was_built(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[n % 50] for n in range(100)])
    _, built = both(prefix, 32, tmp_path / "cache")
    theirs, found = both(prefix, 32, tmp_path / "cache")
    assert isinstance(theirs.sample_index, np.memmap)
    assert_same_samples(theirs, found)
    assert_same_samples(theirs, built)


def test_a_batch_is_its_samples_one_above_the_other(tmp_path: Path) -> None:
    theirs, ours = both(write(tmp_path / "a", [[n % 50] for n in range(99)]), 32, tmp_path / "c")
    indices = [len(ours) - 1, 0, 5, 5, 2]
    batch = ours.batch(indices)
    for name, tensor in batch.items():
        assert torch.equal(tensor, torch.stack([theirs[index][name] for index in indices])), name
        assert tensor.is_contiguous(), f"{name} could not be pinned"


def test_a_batch_stays_as_it_was_when_later_ones_are_read(tmp_path: Path) -> None:
    _, ours = both(write(tmp_path / "a", [[n % 50] for n in range(99)]), 32, tmp_path / "cache")
    first = ours.batch([0, 1])
    kept = {name: tensor.clone() for name, tensor in first.items()}
    ours.batch([2, 3])
    for name, tensor in first.items():
        assert torch.equal(tensor, kept[name]), name


def test_a_number_beyond_the_last_sample_is_an_index_error(tmp_path: Path) -> None:
    _, ours = both(write(tmp_path / "a", [[200]]), 32, tmp_path / "cache")
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_another_process_gets_the_path_of_the_data_set_not_its_tokens(tmp_path: Path) -> None:
    theirs, ours = both(write(tmp_path / "a", [[100_000]]), 512, tmp_path / "cache")
    sent = pickle.dumps(ours)
    assert len(sent) < (tmp_path / "a.bin").stat().st_size / 10
    assert_same_samples(theirs, pickle.loads(sent))
