"""Read a checkpoint's weights one at a time: no process group, no megatron-core, no GPU.

The files are PyTorch's distributed checkpoint format, with each weight under its name in the whole
model; shards of whatever layout wrote them are put together here.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from phi1_megatron.errors import CheckpointError

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


class WeightReader:
    """The weights of one checkpoint by name; each read opens only the shards it needs."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        try:
            self._stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint} cannot be read ({type(error).__name__}: {error}): its .metadata is "
                "missing or torn"
            ) from None

    def names(self) -> list[str]:
        """Every weight's name in the whole model, as ``decoder.layers.0.mlp.linear_fc1.weight``."""
        return [
            name
            for name, kind in self._stored.items()
            if name.startswith(_MODEL_PREFIXES) and isinstance(kind, TensorStorageMetadata)
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(self._metadata(name).size)

    def read(self, name: str) -> Tensor:
        """One whole tensor, in the precision it was saved in.

        Raises:
            CheckpointError: there is no such weight, or a shard of it is torn.
        """
        metadata = self._metadata(name)
        tensor = torch.empty(metadata.size, dtype=metadata.properties.dtype)
        try:
            with warnings.catch_warnings():
                # torch notes that no process group is there; that is the point.
                warnings.simplefilter("ignore", UserWarning)
                load(
                    {name: tensor}, storage_reader=FileSystemReader(self._checkpoint), no_dist=True
                )
        except Exception as error:
            raise CheckpointError(
                f"{name} cannot be read from {self._checkpoint}: a shard is missing or torn "
                f"({type(error).__name__}: {error})"
            ) from error
        return tensor

    def _metadata(self, name: str) -> TensorStorageMetadata:
        metadata = self._stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            raise CheckpointError(f"{self._checkpoint} holds no weight {name}")
        return metadata


def open_weights(checkpoint: Path) -> WeightReader:
    """The weights of a checkpoint folder (see ``folder.find_checkpoint`` for run folders)."""
    return WeightReader(Path(checkpoint))
