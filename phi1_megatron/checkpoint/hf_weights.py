"""The weights of a Hugging Face folder: safetensors files, streamed out and read tensor by tensor.

The safetensors format: 8 bytes little-endian length of the header; the header, JSON of name →
dtype, shape and byte range, padded with spaces to a multiple of 8; then the ranges, without gaps
(https://huggingface.co/docs/safetensors, "Format"). Shapes are known before any number is, so the
header is written first and every tensor is streamed behind it: no more than one is ever held.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi1_megatron.checkpoint.hf_folder import read_json, write_json
from phi1_megatron.checkpoint.hf_mapping import (
    COMPUTED_HUGGINGFACE_SUFFIXES,
    expected_huggingface_shapes,
    mismatch,
)
from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# A slice of a tensor small enough that casting and checking it adds little to the peak memory.
_PIECE_BYTES = 32 * 2**20


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], bytes_per_number: int, max_shard_bytes: int
) -> list[list[str]]:
    """Names of the tensors in each file: in order, a new file where the next would not fit.

    A tensor larger than ``max_shard_bytes`` gets a file of its own.
    """
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * bytes_per_number
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Iterator[tuple[str, int]]:
    """Stream ``tensors`` (the names of ``shapes``, in that order) into safetensors files.

    Yields the name and the written bytes of each tensor; one tensor is held at a time.

    Raises:
        CheckpointError: a number is not finite, or does not fit ``dtype``.
    """
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                given, tensor = next(tensors)
                assert (given, tuple(tensor.shape)) == (name, shapes[name])
                size = 0
                for piece in _pieces(tensor):
                    data = piece.to(dtype).contiguous()
                    _check_finite(data, piece, name)
                    size += stream.write(data.view(torch.uint8).numpy().data)
                yield name, size
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        numbers = sum(math.prod(shape) for shape in shapes.values())
        write_json(
            folder / INDEX,
            {
                "metadata": {
                    "total_parameters": numbers,
                    "total_size": numbers * dtype.itemsize,
                },
                "weight_map": {
                    name: file for file, names in zip(files, shards, strict=True) for name in names
                },
            },
        )


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Slices of ``tensor`` along its rows, each of about ``_PIECE_BYTES``."""
    row_bytes = max(1, tensor.nbytes // tensor.shape[0])
    pieces: tuple[Tensor, ...] = tensor.split(max(1, _PIECE_BYTES // row_bytes))
    return pieces


def _check_finite(data: Tensor, source: Tensor, where: str) -> None:
    if torch.isfinite(data).all():
        return
    if torch.isfinite(source).all():
        largest = source.abs().max().item()
        raise CheckpointError(
            f"{where} holds {largest:g}, which {data.dtype} cannot hold (it ends at "
            f"{torch.finfo(data.dtype).max:g}); choose bf16 or fp32"
        )
    bad = int((~torch.isfinite(source)).sum())
    raise CheckpointError(
        f"{where} holds NaN or infinity ({bad} numbers in the first place that has any); "
        "take an earlier checkpoint"
    )


# ---- reading ---------------------------------------------------------------------------------


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder, read one at a time.

    Opening checks every file's header, names and shapes against ``model``; numbers are checked as
    they are read.

    Raises:
        CheckpointError: a file is missing or truncated, or tensors are missing, extra or wrongly
            shaped; all of them are named.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            with _opened(file) as content:
                for name in content.keys():  # noqa: SIM118 - no mapping, it only has keys()
                    if not name.endswith(COMPUTED_HUGGINGFACE_SUFFIXES):
                        shapes[name] = tuple(content.get_slice(name).get_shape())
                        self._file_of[name] = file
        wrong = mismatch(shapes, expected_huggingface_shapes(model))
        if wrong:
            raise CheckpointError(
                f"{folder} does not hold the weights of its config.json's architecture: {wrong}"
            )

    def names(self) -> list[str]:
        """Hugging Face's names, in the files' order."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in the type it is stored in."""
        # Opened anew for each tensor: an open file keeps every page read so far in memory.
        with _opened(self._file_of[name]) as content:
            tensor: Tensor = content.get_tensor(name)
        for piece in _pieces(tensor):
            _check_finite(piece, piece, f"{name} in {self._file_of[name]}")
        return tensor


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, though the index beside it names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = set(index.get("weight_map", {}).values())
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    other = sorted(path.name for path in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}"
        + (f", only {', '.join(other)}; save it again with safetensors" if other else "")
    )
