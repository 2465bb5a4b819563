"""Training samples: blends over megatron-core's ``GPTDataset``, and loaders that resume exactly.

Tensors are ``[micro batch, sequence]`` int64, losses' mask fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from phi1_megatron.config.schema import BlendPart, RunConfig
from phi1_megatron.data.indexed import read_index
from phi1_megatron.data.order import SampleOrder
from phi1_megatron.data.report import check_same_tokenizer, read_report
from phi1_megatron.distributed.layout import Layout
from phi1_megatron.errors import DataError

Batch = dict[str, Tensor]


class EpochSamples(Protocol):
    """One epoch of one data set: megatron-core's ``GPTDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class BlendedSamples(Dataset[Batch]):
    """Samples of a blend by their position in the run; it has no end, only more epochs.

    Each item has ``tokens``, ``labels`` (the tokens one place on), ``loss_mask`` and
    ``position_ids``, each ``[seq_length]``.
    """

    def __init__(
        self,
        parts: Sequence[EpochSamples],
        prefixes: Sequence[str],
        order: SampleOrder,
        rows: int,
    ) -> None:
        self._parts, self._prefixes, self._order, self._rows = parts, prefixes, order, rows

    def __getitem__(self, position: int) -> Batch:
        part, index = self._order.locate(position)
        sample = self._parts[part][index]
        highest = int(sample["labels"].max())
        if highest >= self._rows:
            # Tensor-parallel embeddings would take it for another rank's row, and read zeros.
            raise DataError(
                f"{self._prefixes[part]} holds token {highest}, but the model's vocabulary has "
                f"{self._rows} rows (0 to {self._rows - 1}): raise model.vocab_size, or preprocess "
                "with the model's own tokenizer"
            )
        return sample


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


def open_data(config: RunConfig, run_dir: Path) -> RunData:
    """Build or find the sample indices and open every data set of the blends.

    Every rank calls this: rank 0 builds what is missing in the index cache, the others wait.
    """
    cache = Path(config.data.index_cache or run_dir / "index-cache")
    own_validation = config.data.validation_blend
    split = [1.0, 0.0, 0.0] if own_validation else config.data.split
    training = _open_blend(config, config.data.blend, split, which=0, cache=cache)
    validation = None
    if config.training.eval_interval:
        if own_validation:
            validation = _open_blend(config, own_validation, [1.0, 0.0, 0.0], 0, cache)
        else:
            validation = _open_blend(config, config.data.blend, split, which=1, cache=cache)
    return RunData(training, validation)


def _open_blend(
    config: RunConfig, blend: Sequence[BlendPart], split: Sequence[float], which: int, cache: Path
) -> BlendedSamples:
    parts = [_open_part(config, part.prefix, split, which, cache) for part in blend]
    order = SampleOrder(
        [len(part) for part in parts], [part.weight for part in blend], config.training.seed + which
    )
    rows = config.model.padded_vocab_size
    return BlendedSamples(parts, [part.prefix for part in blend], order, rows)


def _open_part(
    config: RunConfig, prefix: str, split: Sequence[float], which: int, cache: Path
) -> EpochSamples:
    """One epoch of one data set's training (0) or validation (1) share."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    dataset_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.data.seq_length,
        blend=([prefix], None),
        split=",".join(f"{share:g}" for share in split),
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(config.model.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    name = ("training", "validation")[which]
    short = DataError(
        f"the {name} share of {prefix} is too small for one sample of {config.data.seq_length} "
        f"tokens (data.split = {list(split)}); give it a larger share"
    )
    if split[which] == 0:
        raise short
    try:
        built = BlendedMegatronDatasetBuilder(
            GPTDataset, [None, None, None], lambda: True, dataset_config
        ).build()[which]
    except (AssertionError, ValueError, IndexError) as error:
        raise short from error
    if built is None or len(built) < 1:
        raise short
    return built  # type: ignore[no-any-return]


class _TokenizerFacts:
    """What megatron-core's data sets ask of a tokenizer. phi-1's has no padding token, and
    samples are never padded, so these stand for tokens that no data set can hold."""

    pad = -2
    eod = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"vocab_size": vocab_size}


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
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # A loader draws a seed when it starts; from a generator of its own, so that dropout after
        # a resume is what it would have been.
        generator=torch.Generator(),
    )
    return iter(loader)


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
