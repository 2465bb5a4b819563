"""Training samples: blends of packed data sets, and loaders that resume exactly.

Tensors are ``[micro batch, sequence]`` int64, losses' mask fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from phi1_megatron.config.schema import BlendPart, RunConfig
from phi1_megatron.data.indexed import read_index
from phi1_megatron.data.order import SampleOrder
from phi1_megatron.data.report import check_same_tokenizer, read_report
from phi1_megatron.data.sample_index import Share, open_share
from phi1_megatron.data.samples import PackedSamples, Rows, as_batch, empty_rows
from phi1_megatron.distributed.layout import Layout
from phi1_megatron.errors import DataError

Batch = dict[str, Tensor]


class BlendedSamples(Dataset[Batch]):
    """Samples of a blend by their position in the run; it has no end, only more epochs.

    Each item has ``tokens``, ``labels`` (the tokens one place on), ``loss_mask`` and
    ``position_ids``, each ``[seq_length]``; a batch of them, which a loader asks for as
    ``__getitems__``, is ``[b, seq_length]``. Of the last two do not write to either.
    """

    def __init__(
        self,
        parts: Sequence[PackedSamples],
        prefixes: Sequence[str],
        order: SampleOrder,
        rows: int,
    ) -> None:
        self._parts, self._prefixes, self._order, self._rows = parts, prefixes, order, rows

    def __getitem__(self, position: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        rows = empty_rows(len(positions), self._parts[0].seq_length)
        located = [self._order.locate(position) for position in positions]
        for (part, index), tokens, labels in zip(located, rows[0], rows[1], strict=True):
            self._parts[part].read(index, tokens, labels)
        # Read without signs, an id below 0 is a very high one: one look finds both.
        if int(rows.view(np.uint64).max()) >= self._rows:
            self._refuse(rows, [part for part, _ in located])
        return as_batch(rows)

    def _refuse(self, rows: Rows, parts: Sequence[int]) -> NoReturn:
        """Name the first id of a batch that the model has no row for.

        Tensor-parallel embeddings would take it for another rank's row, and read zeros.
        """
        wrong = np.argwhere((rows < 0) | (rows >= self._rows))[0]
        raise DataError(
            f"{self._prefixes[parts[wrong[1]]]} holds token {rows[tuple(wrong)]}, but the model's "
            f"vocabulary has {self._rows} rows (0 to {self._rows - 1}): raise model.vocab_size, or "
            "preprocess with the model's own tokenizer"
        )


@dataclass(frozen=True)
class RunData:
    """What a run reads. ``validation`` is None where the recipe never validates."""

    training: BlendedSamples
    validation: BlendedSamples | None


def check_data(config: RunConfig) -> None:
    """Look at every data set before any rank is started; no torch.distributed needed.

    Raises:
        DataError: a file is missing, truncated or too short for one sample, or was made with a
            tokenizer that knows more tokens than the model, or with another one than the rest.
    """
    parts = [*config.data.blend, *(config.data.validation_blend or [])]
    for part in parts:
        index = read_index(part.prefix)
        needed = config.data.seq_length + 1
        if index.num_tokens < needed:
            raise DataError(
                f"{part.prefix} holds {index.num_tokens} tokens; one sample takes {needed} "
                f"(data.seq_length {config.data.seq_length} + 1)"
            )
        report = read_report(part.prefix)
        known = config.model.vocab_size
        if report is not None and report.tokenizer.vocab_size > known:
            raise DataError(
                f"{part.prefix} was made with tokenizer {report.tokenizer.name}, whose vocabulary "
                f"of {report.tokenizer.vocab_size:,} is larger than model.vocab_size {known:,}; "
                "raise model.vocab_size, or preprocess with the model's own tokenizer"
            )
    check_same_tokenizer(part.prefix for part in parts)


def unigram_entropy(config: RunConfig) -> float | None:
    """Entropy of single tokens in the training data, in nats; None for a blend, or where another
    tool made the data set."""
    if len(config.data.blend) > 1:
        return None
    report = read_report(config.data.blend[0].prefix)
    return report.unigram_entropy_nats if report else None


@dataclass(frozen=True)
class PreparedShare:
    """One data set's share of a run, as :func:`prepare_data` found or built its index.

    Attributes
    ----------
    name
        What it is for: training or validation.
    samples
        In one epoch.
    taken
        Samples that the run takes of it, or one validation does; of a blend, on average.
    files
        The index in the cache.
    built
        Whether it was not there before.
    """

    name: str
    prefix: str
    samples: int
    taken: float
    files: tuple[Path, ...]
    built: bool


def _shares(config: RunConfig) -> list[tuple[Share, list[BlendPart]]]:
    """What a run reads, and of which blend: training data, validation data if it validates."""
    data = config.data
    if not data.validation_blend:
        shares = [
            (Share("training", data.split, 0), data.blend),
            (Share("validation", data.split, 1), data.blend),
        ]
    else:
        whole = [1.0, 0.0, 0.0]
        shares = [
            (Share("training", whole, 0), data.blend),
            (Share("validation", whole, 0), data.validation_blend),
        ]
    return shares if config.training.eval_interval else shares[:1]


def index_cache(config: RunConfig, run_dir: Path) -> Path:
    """The folder of the sample indices."""
    return Path(config.data.index_cache or run_dir / "index-cache")


def open_data(config: RunConfig, run_dir: Path) -> RunData:
    """Build or find the sample indices and open every data set of the blends.

    Every rank calls this: rank 0 builds what is missing in the index cache, the others wait.
    """
    cache = index_cache(config, run_dir)
    training, *validation = (
        _open_blend(config, share, blend, cache) for share, blend in _shares(config)
    )
    return RunData(training, validation[0] if validation else None)


def prepare_data(
    config: RunConfig, run_dir: Path, on_start: Callable[[str, str], None] | None = None
) -> Iterator[PreparedShare]:
    """Build the sample indices that :func:`open_data` would build at rank 0, one after the other.

    Parameters
    ----------
    on_start
        Called with the share's name and the prefix before each is looked for.
    """
    cache = index_cache(config, run_dir)
    there = set(cache.iterdir()) if cache.is_dir() else set()
    training = config.training
    for share, blend in _shares(config):
        steps = training.train_steps if share.name == "training" else training.eval_steps
        whole = sum(part.weight for part in blend)
        for part in blend:
            if on_start is not None:
                on_start(share.name, part.prefix)
            opened = open_share(config, part.prefix, share, cache)
            yield PreparedShare(
                name=share.name,
                prefix=part.prefix,
                samples=len(opened.samples),
                taken=steps * training.global_batch_size * part.weight / whole,
                files=opened.files,
                built=not there.issuperset(opened.files),
            )
            there.update(opened.files)


def _open_blend(
    config: RunConfig, share: Share, blend: Sequence[BlendPart], cache: Path
) -> BlendedSamples:
    parts = [open_share(config, part.prefix, share, cache).samples for part in blend]
    order = SampleOrder(
        [len(part) for part in parts],
        [part.weight for part in blend],
        config.training.seed + share.place,
    )
    rows = config.model.padded_vocab_size
    return BlendedSamples(parts, [part.prefix for part in blend], order, rows)


def micro_batches(
    samples: BlendedSamples,
    config: RunConfig,
    layout: Layout,
    data_rank: int,
    first_sample: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's micro batches for ever, from the step that begins at ``first_sample``.

    Each step takes the next ``global_batch_size`` positions of the run; every data-parallel rank
    takes its share of them, ``micro_batch_size`` at a time. Each value is ``[b, s]``.
    """
    positions = _positions(config, layout, data_rank, first_sample)
    workers = config.data.num_workers
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_whole_batch,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # A loader draws a seed when it starts; from a generator of its own, so that dropout after
        # a resume is what it would have been.
        generator=torch.Generator(),
    )
    return iter(loader)


def _whole_batch(batch: Any) -> Any:
    """In the place of torch's collation: ``BlendedSamples`` gives whole batches."""
    return batch


def _positions(
    config: RunConfig, layout: Layout, data_rank: int, first_sample: int
) -> Iterator[list[int]]:
    micro = config.training.micro_batch_size
    start = first_sample
    while True:
        for index in range(layout.num_microbatches):
            first = start + (index * layout.data + data_rank) * micro
            yield list(range(first, first + micro))
        start += config.training.global_batch_size


def to_device(batch: Batch, device: torch.device | int) -> Batch:
    """The batch on the device; copies overlap with work where the batch is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
