"""The sample index of a data set's training or validation share, in megatron-core's own cache.

``GPTDataset`` builds the three arrays and keeps them in the cache folder; its file names hold a
hash of what the arrays depend on, except for what is in the data set itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.indexed import TokenReader
from phi1_megatron.data.samples import PackedSamples
from phi1_megatron.errors import DataError


@dataclass(frozen=True)
class Share:
    """Which part of a data set: ``split[place]`` of it.

    Attributes
    ----------
    name
        What it is for, training or validation.
    split
        Shares of every data set, in the order of its documents.
    place
        0, the share that is shuffled as training data is, or 1.
    """

    name: Literal["training", "validation"]
    split: Sequence[float]
    place: int


@dataclass(frozen=True)
class IndexedShare:
    """An epoch of one data set's share, and the files in the cache that make it one."""

    samples: PackedSamples
    files: tuple[Path, ...]


def open_share(config: RunConfig, prefix: str, share: Share, cache: Path) -> IndexedShare:
    """Find or build the index of a data set's share.

    Every rank calls this: rank 0 builds what is missing in the cache, the others wait. Without
    torch.distributed the one process builds.

    Raises
    ------
    DataError
        The share is too small for one sample, or the cache holds something else than its index.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    dataset_config = gpt_dataset_config(config, prefix, share.split, cache)
    reader = TokenReader(prefix)
    seq_length = config.data.seq_length
    # Rounded as BlendedMegatronDatasetBuilder does, which would build the other shares too.
    bounds = dataset_config.split_matrix[share.place] or (0.0, 0.0)
    first, end = (round(bound * float(reader.index.num_sequences)) for bound in bounds)
    tokens = int(reader.index.sequence_lengths[first:end].sum(dtype=np.int64))
    if tokens < seq_length + 1:
        raise DataError(
            f"the {share.name} share of {prefix} holds {tokens:,} tokens, too small for one sample "
            f"of {seq_length} + 1 (data.split = {list(share.split)}); give it a larger share"
        )
    low_level = GPTDataset.build_low_level_dataset(prefix, dataset_config)
    try:
        built = BlendedMegatronDatasetBuilder.build_generic_dataset(
            GPTDataset,
            lambda: True,
            True,
            low_level,
            prefix,
            np.arange(first, end, dtype=np.int32),
            None,
            (Split.train, Split.valid)[share.place],
            dataset_config,
        )
    except OSError as error:
        raise DataError(
            f"the index cache {cache} cannot be used: {error.strerror or error}; name a folder "
            "that can be written (data.index_cache)"
        ) from error
    except (ValueError, EOFError, pickle.UnpicklingError) as error:  # numpy, of a file cut off
        raise DataError(
            f"the index cache {cache} holds a damaged file for {prefix} ({error}); remove the "
            "folder, it is built again"
        ) from error
    expected = (end - first, (tokens - 1) // seq_length)
    found = (len(built.document_index), len(built.shuffle_index))
    if found != expected:
        raise DataError(
            f"the index cache {cache} knows {found[0]:,} sequences and {found[1]:,} samples of "
            f"{prefix}, which has {expected[0]:,} and {expected[1]:,}: it is of an earlier data "
            "set of this name; remove the folder, it is built again"
        )
    samples = PackedSamples(
        reader, seq_length, built.document_index, built.sample_index, built.shuffle_index
    )
    name = f"{built.unique_description_hash}-GPTDataset-{built.index_split.name}-*"
    return IndexedShare(samples, tuple(sorted(cache.glob(name))))


def gpt_dataset_config(config: RunConfig, prefix: str, split: Sequence[float], cache: Path) -> Any:
    """megatron-core's ``GPTDatasetConfig`` of one data set."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
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


class _TokenizerFacts:
    """What megatron-core's data sets ask of a tokenizer. phi-1's has no padding token, and
    samples are never padded, so these stand for tokens that no data set can hold."""

    pad = -2
    eod = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"vocab_size": vocab_size}
