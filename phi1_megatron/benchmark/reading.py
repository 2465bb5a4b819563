"""How fast training reads its samples, beside megatron-core's ``GPTDataset`` in the same run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from phi1_megatron.config.load import parse_config
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.datasets import micro_batches, open_data
from phi1_megatron.data.indexed import TokenReader
from phi1_megatron.data.sample_index import gpt_dataset_config
from phi1_megatron.data.samples import PackedSamples
from phi1_megatron.distributed.layout import plan_layout

MICRO_BATCH = 8
_WHOLE = [1.0, 0.0, 0.0]
_COMPARED = 256

Pass = Callable[[], None]
"""Serves every sample of the measurement once."""


@dataclass(frozen=True)
class PairedSpeeds:
    """Samples a second, measured in turns: the n-th of the one belongs to the n-th of the other."""

    theirs: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median of the pairs' ratios."""
        return statistics.median(o / t for o, t in zip(self.ours, self.theirs, strict=True))


@dataclass(frozen=True)
class ReadingMeasurement:
    """What was measured of one data set.

    Attributes
    ----------
    samples
        Served in each pass, in random order, by one process.
    data_set
        ``GPTDataset`` sample by sample, beside ``PackedSamples`` by micro batches.
    loader
        Both through torch's ``DataLoader`` without workers: theirs in a given order, ours as
        training does, with the blend's order and the check of ids.
    """

    prefix: str
    dtype: str
    documents: int
    tokens: int
    seq_length: int
    samples: int
    micro_batch: int
    data_set: PairedSpeeds
    loader: PairedSpeeds


def measure_reading(
    prefix: str | Path, seq_length: int = 2048, samples: int = 8192, repeats: int = 7
) -> ReadingMeasurement:
    """Read samples in random order through ``GPTDataset`` and through ours, in turns.

    Both read the same index, which is built in a temporary folder; every page is touched once
    before anything is timed. That the two serve the same is looked at on the way.

    Parameters
    ----------
    samples
        In each pass; of a smaller data set some come more than once.
    repeats
        Pairs of passes.

    Raises
    ------
    DataError
        There is no such data set, or it is too short for one sample.
    """
    samples = -(-samples // MICRO_BATCH) * MICRO_BATCH
    with tempfile.TemporaryDirectory(prefix="phi1-reading-") as folder:
        config = _config(TokenReader(prefix), seq_length)
        run = open_data(config, Path(folder))
        theirs = _gpt_dataset(config, Path(folder) / "index-cache")
        reader = TokenReader(prefix)
        ours = PackedSamples(
            reader, seq_length, theirs.document_index, theirs.sample_index, theirs.shuffle_index
        )
        order = _random_order(len(ours), samples)
        batches = [order[at : at + MICRO_BATCH] for at in range(0, samples, MICRO_BATCH)]
        _assert_same(theirs, ours, order[:_COMPARED])
        training = micro_batches(run.training, config, plan_layout(config, 1), 0, 0)

        def their_loader() -> None:
            for _ in DataLoader(theirs, batch_sampler=batches):
                pass

        def our_loader() -> None:
            for _ in batches:
                next(training)

        return ReadingMeasurement(
            prefix=str(prefix),
            dtype=str(reader.index.dtype),
            documents=reader.index.num_documents,
            tokens=reader.index.num_tokens,
            seq_length=seq_length,
            samples=samples,
            micro_batch=MICRO_BATCH,
            data_set=_in_turns(
                lambda: _ask(theirs.__getitem__, order),
                lambda: _ask(ours.batch, batches),
                samples,
                repeats,
            ),
            loader=_in_turns(their_loader, our_loader, samples, repeats),
        )


def benchmark_read_text(measurement: ReadingMeasurement) -> str:
    """The measurement in a few lines of at most 80 columns."""
    lines = [
        f"{measurement.prefix}: {measurement.documents:,} documents, "
        f"{measurement.tokens:,} tokens as {measurement.dtype}",
        f"samples of {measurement.seq_length:,} tokens, {measurement.samples:,} in random order, "
        "one process",
        f"{'samples/s, median':<24}{'GPTDataset':>14}{'ours':>14}{'ours is':>12}",
    ]
    for name, speeds in (
        ("from the data set", measurement.data_set),
        ("through the loader", measurement.loader),
    ):
        theirs, ours = statistics.median(speeds.theirs), statistics.median(speeds.ours)
        lines.append(f"{name:<24}{theirs:>14,.0f}{ours:>14,.0f}{speeds.ratio:>11.1f}x")
    return "\n".join(lines)


def _config(reader: TokenReader, seq_length: int) -> RunConfig:
    """A run that reads the whole data set and checks its ids."""
    return parse_config(
        {
            "model": {
                "vocab_size": int(np.iinfo(reader.index.dtype).max) + 1,
                "max_position_embeddings": seq_length,
            },
            "data": {
                "blend": [str(reader.index.prefix)],
                "split": _WHOLE,
                "seq_length": seq_length,
            },
            "training": {
                "train_steps": 1000,
                "global_batch_size": MICRO_BATCH,
                "micro_batch_size": MICRO_BATCH,
                "eval_interval": 0,
            },
        },
        source="the reading benchmark",
    )


def _gpt_dataset(config: RunConfig, cache: Path) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    dataset_config = gpt_dataset_config(config, config.data.blend[0].prefix, _WHOLE, cache)
    return BlendedMegatronDatasetBuilder(
        GPTDataset, [None] * 3, lambda: True, dataset_config
    ).build()[0]


def _random_order(size: int, samples: int) -> list[int]:
    """``samples`` numbers below ``size``; each once before any comes again."""
    generator = np.random.default_rng(0)
    rounds = [generator.permutation(size) for _ in range(-(-samples // size))]
    return [int(number) for number in np.concatenate(rounds)[:samples]]


def _assert_same(theirs: Any, ours: PackedSamples, order: list[int]) -> None:
    batch = ours.batch(order)
    for row, number in enumerate(order):
        for name, expected in theirs[number].items():
            assert torch.equal(batch[name][row], expected), f"{name} of sample {number} differs"


def _ask(serve: Callable[[Any], Any], requests: list[Any]) -> None:
    for request in requests:
        serve(request)


def _in_turns(theirs: Pass, ours: Pass, samples: int, repeats: int) -> PairedSpeeds:
    """Every other pair begins with ours, so that neither has the better place."""
    passes = (theirs, ours)
    speeds: tuple[list[float], list[float]] = ([], [])
    for one in passes:
        one()
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            began = time.perf_counter()
            passes[which]()
            speeds[which].append(samples / (time.perf_counter() - began))
    return PairedSpeeds(tuple(speeds[0]), tuple(speeds[1]))
