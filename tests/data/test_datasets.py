"""Blends, loaders and index caches, against megatron-core's ``GPTDataset`` in the same order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import BlendedSamples, micro_batches, open_data, prepare_data
from phi1_megatron.data.indexed import IndexedDatasetWriter
from phi1_megatron.data.order import SampleOrder
from phi1_megatron.data.sample_index import gpt_dataset_config
from phi1_megatron.distributed.layout import plan_layout
from phi1_megatron.errors import DataError
from tests.distributed_harness import tiny_config
from tests.training.toy_data import toy_config, write_toy_data

VALIDATING = {"eval_interval": 2, "eval_steps": 3}


def blended(tmp_path: Path, data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    """Two parts of one data set, one part of another."""
    a = write_toy_data(tmp_path / "a", documents=60, seed=5)
    b = write_toy_data(tmp_path / "b", documents=30, seed=6)
    blend = [{"prefix": a, "weight": 2.0}, {"prefix": b, "weight": 1.0}]
    return tiny_config(data={"blend": blend, **(data or {})}, training={**VALIDATING, **training})


def megatron_parts(config: RunConfig, place: int, folder: Path) -> list[Any]:
    """A share of each data set by megatron-core's own builder."""
    return [
        BlendedMegatronDatasetBuilder(
            GPTDataset,
            [None] * 3,
            lambda: True,
            gpt_dataset_config(config, part.prefix, config.data.split, folder),
        ).build()[place]
        for part in config.data.blend
    ]


def reference(config: RunConfig, place: int, folder: Path, positions: range) -> list[Any]:
    """megatron-core's samples in the order of the run."""
    parts = megatron_parts(config, place, folder)
    weights = [part.weight for part in config.data.blend]
    order = SampleOrder([len(part) for part in parts], weights, config.training.seed + place)
    return [parts[part][index] for part, index in map(order.locate, positions)]


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", [0, 1])
def test_micro_batches_are_the_samples_of_megatron_core_in_the_order_of_the_run(
    place: int, workers: int, tmp_path: Path
) -> None:
    config = blended(tmp_path, {"num_workers": workers}, micro_batch_size=4)
    run = open_data(config, tmp_path / "run")
    samples = (run.training, run.validation)[place]
    assert samples is not None
    # Ten batches of 4, from the third step on: more than an epoch of either share.
    batches = islice(micro_batches(samples, config, plan_layout(config, 1), 0, 16), 10)
    expected = reference(config, place, tmp_path / "other-cache", range(16, 56))
    for number, batch in enumerate(batches):
        for name, rows in batch.items():
            whole = torch.stack([sample[name] for sample in expected[4 * number : 4 * number + 4]])
            assert torch.equal(rows, whole), f"{name} of micro batch {number}"


def test_one_sample_is_the_row_of_its_batch(tmp_path: Path) -> None:
    samples = open_data(blended(tmp_path), tmp_path / "run").training
    batch = samples.__getitems__([7, 3])
    for row, position in enumerate([7, 3]):
        for name, tensor in samples[position].items():
            assert torch.equal(tensor, batch[name][row]), name


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(np.uint16, 128), (np.uint16, 65_535), (np.int32, -1), (np.int32, 128)]
)
def test_an_id_that_the_model_has_no_row_for_is_refused_with_its_data_set(
    dtype: Any, wrong: int, tmp_path: Path
) -> None:
    good = write_toy_data(tmp_path / "good")
    with IndexedDatasetWriter(tmp_path / "bad", dtype) as writer:
        writer.add_document([1] * 40 + [wrong] + [2] * 200)
    config = tiny_config(data={"blend": [good, str(tmp_path / "bad")], "split": [1.0, 0.0, 0.0]})
    assert config.model.padded_vocab_size == 128
    samples = open_data(config, tmp_path / "run").training
    with pytest.raises(DataError, match=rf"bad holds token {wrong}, but .* 128 rows \(0 to 127\)"):
        samples.__getitems__(range(16))


def test_the_highest_id_that_the_model_has_a_row_for_is_served(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([127, 0] * 100)
    config = toy_config(str(tmp_path / "a"), data={"split": [1.0, 0.0, 0.0]})
    assert int(open_data(config, tmp_path / "run").training[0]["labels"].max()) == 127


def test_a_share_too_small_for_one_sample_is_named_with_its_tokens(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for length in (100, 32):
            writer.add_document([1] * length)
    config = toy_config(str(tmp_path / "a"), data={"split": [50.0, 50.0, 0.0]}, training=VALIDATING)
    with pytest.raises(DataError, match=r"validation share of .* holds 32 tokens.* 32 \+ 1"):
        open_data(config, tmp_path / "run")


def test_a_run_that_never_validates_needs_no_documents_to_validate_on(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1] * 200)
    run = open_data(toy_config(str(tmp_path / "a")), tmp_path / "run")
    assert run.validation is None
    assert len(run.training[0]["tokens"]) == 32


def test_the_cache_of_an_earlier_data_set_of_the_name_is_refused(tmp_path: Path) -> None:
    config = toy_config(write_toy_data(tmp_path / "a"))
    open_data(config, tmp_path / "run")
    write_toy_data(tmp_path / "a", documents=61)
    with pytest.raises(DataError, match=r"knows 48 sequences .* which has 49 .* remove the folder"):
        open_data(config, tmp_path / "run")


@pytest.mark.parametrize("left", [0, 60, 200])
def test_an_index_that_was_cut_off_is_named_as_damaged(left: int, tmp_path: Path) -> None:
    config = toy_config(write_toy_data(tmp_path / "a"))
    open_data(config, tmp_path / "run")
    (shuffle,) = (tmp_path / "run" / "index-cache").glob("*shuffle_index.npy")
    shuffle.write_bytes(shuffle.read_bytes()[:left])
    with pytest.raises(DataError, match=r"index-cache holds a damaged file .* remove the folder"):
        open_data(config, tmp_path / "run")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    prefix = write_toy_data(tmp_path / "a")
    config = toy_config(prefix, data={"index_cache": str(tmp_path / "taken")})
    with pytest.raises(DataError, match=r"taken cannot be used: File exists; name a folder"):
        open_data(config, tmp_path / "run")


def test_what_was_prepared_is_all_that_a_run_opens(tmp_path: Path) -> None:
    config = blended(tmp_path)
    prepared = list(prepare_data(config, tmp_path / "run"))
    assert [(part.name, Path(part.prefix).name, part.built) for part in prepared] == [
        ("training", "a", True),
        ("training", "b", True),
        ("validation", "a", True),
        ("validation", "b", True),
    ]
    before = files_of(tmp_path / "run" / "index-cache")
    assert {path.name for part in prepared for path in part.files} == set(before)
    again = list(prepare_data(config, tmp_path / "run"))
    assert [part.built for part in again] == [False] * 4
    run = open_data(config, tmp_path / "run")
    assert isinstance(run.validation, BlendedSamples)
    assert files_of(tmp_path / "run" / "index-cache") == before


def test_preparing_counts_what_the_run_will_take(tmp_path: Path) -> None:
    config = blended(tmp_path, train_steps=30, global_batch_size=8)
    parts = list(prepare_data(config, tmp_path / "run"))
    assert [part.taken for part in parts] == [160.0, 80.0, 16.0, 8.0]
    for place in (0, 1):
        theirs = megatron_parts(config, place, tmp_path / "other-cache")
        ours = parts[2 * place : 2 * place + 2]
        assert [part.samples for part in ours] == [len(part) for part in theirs]


def test_an_index_shared_by_training_and_validation_is_built_once(tmp_path: Path) -> None:
    prefix = write_toy_data(tmp_path / "a")
    config = toy_config(prefix, data={"validation_blend": [prefix]}, training=VALIDATING)
    training, validation = prepare_data(config, tmp_path / "run")
    assert (training.built, validation.built) == (True, False)
    assert training.files == validation.files
