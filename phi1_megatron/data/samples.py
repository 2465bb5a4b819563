"""Samples of one length, read from an indexed data set at a few microseconds each.

A sample is ``seq_length + 1`` tokens of the joined documents: all but the last are its tokens, all
but the first its labels. Which tokens, megatron-core's ``GPTDataset`` has decided in the three
arrays of its index; reading them here takes memory-map slices and no tensor operation per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phi1_megatron.data.indexed import TokenReader

Rows = npt.NDArray[np.int64]
"""Room for a batch, [2, b, s]: its tokens, its labels. For one sample, [2, s]."""

_FEW_PARTS = 16
"""Up to as many documents in one sample are copied one by one; more are gathered in one call."""


class PackedSamples:
    """One epoch of one data set: sample for sample what ``GPTDataset`` serves for the same index.

    Parameters
    ----------
    reader
        The data set.
    document_index
        int32 [sequences of the epoch]: their numbers in the data set, in the order they are joined.
    sample_index
        int32 or int64 [samples + 1, 2]: where each sample begins, as a place in ``document_index``
        and a token in that sequence.
    shuffle_index
        [samples]: the sample that each number stands for.
    """

    def __init__(
        self,
        reader: TokenReader,
        seq_length: int,
        document_index: npt.NDArray[Any],
        sample_index: npt.NDArray[Any],
        shuffle_index: npt.NDArray[Any],
    ) -> None:
        self._reader, self.seq_length = reader, seq_length
        self._index = (document_index, sample_index, shuffle_index)
        # Bare arrays: each element taken from a numpy.memmap would cost a Python call.
        self._tokens = np.asarray(reader.tokens)
        self._lengths = np.asarray(reader.index.sequence_lengths)
        self._pointers = np.asarray(reader.index.sequence_pointers)
        self._itemsize = reader.index.dtype.itemsize
        self._sequences = np.asarray(document_index)
        self._begins = np.asarray(sample_index).reshape(-1)
        self._shuffle = np.asarray(shuffle_index)
        self._joined = np.empty(seq_length + 1, self._tokens.dtype)
        self._places = np.arange(seq_length + 1)

    def __len__(self) -> int:
        return len(self._shuffle)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample ``index``: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each [s].

        The last two are the same tensors every time: do not write to them.
        """
        rows = np.empty((2, self.seq_length), np.int64)
        self.read(index, rows[0], rows[1])
        return as_batch(rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Samples by their numbers, as :meth:`__getitem__` gives them, each tensor [b, s]."""
        rows = empty_rows(len(indices), self.seq_length)
        for index, tokens, labels in zip(indices, rows[0], rows[1], strict=True):
            self.read(index, tokens, labels)
        return as_batch(rows)

    def read(
        self, index: int, tokens: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> None:
        """Write sample ``index`` to two rows, [s] each."""
        at = 2 * self._shuffle.item(index)
        first, skipped, last, end = self._begins[at : at + 4].tolist()
        if first == last:
            pointer = self._pointers.item(self._sequences.item(first))
            start = pointer // self._itemsize + skipped
            text = self._tokens[start : start + self.seq_length + 1]
        else:
            text = self._join(first, skipped, last, end)
        tokens[:] = text[:-1]
        labels[:] = text[1:]

    def _join(self, first: int, skipped: int, last: int, end: int) -> npt.NDArray[Any]:
        """Tokens ``skipped`` and up of one sequence, those between, and 0 to ``end`` of another;
        valid until the next call."""
        text = self._joined
        if last - first < _FEW_PARTS:
            at = 0
            for place in range(first, last + 1):
                sequence = self._sequences.item(place)
                start = self._pointers.item(sequence) // self._itemsize + skipped
                length = (end + 1 if place == last else self._lengths.item(sequence)) - skipped
                text[at : at + length] = self._tokens[start : start + length]
                at += length
                skipped = 0
            assert at == text.size, (at, text.size)
            return text
        sequences = self._sequences[first : last + 1]
        starts = self._pointers[sequences] // self._itemsize
        lengths = self._lengths[sequences]
        starts[0] += skipped
        lengths[0] -= skipped
        lengths[-1] = end + 1
        shifts = starts - np.cumsum(lengths) + lengths
        text[:] = self._tokens[np.repeat(shifts, lengths) + self._places]
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the data set again: a pickled memory map is all of its bytes.
        return _reopen, (self._reader.index.prefix, self.seq_length, *self._index)


def empty_rows(size: int, seq_length: int) -> Rows:
    """Room for ``size`` samples."""
    return np.empty((2, size, seq_length), np.int64)


def as_batch(rows: Rows) -> dict[str, Tensor]:
    """What a model takes, each [b, s]; tokens and labels are ``rows`` itself, without a copy.

    ``loss_mask`` (fp32) and ``position_ids`` (int64) are the same in every sample, so they are the
    same tensors in every batch: do not write to them.
    """
    loss_mask, position_ids = _same_in_every_batch(rows.shape[1:])
    return {
        "tokens": torch.from_numpy(rows[0]),
        "labels": torch.from_numpy(rows[1]),
        "loss_mask": loss_mask,
        "position_ids": position_ids,
    }


@lru_cache(maxsize=8)
def _same_in_every_batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    # Not views of one row: those cannot be pinned.
    return torch.ones(shape), torch.arange(shape[-1]).expand(shape).contiguous()


def _reopen(prefix: str, seq_length: int, *index: npt.NDArray[Any]) -> PackedSamples:
    return PackedSamples(TokenReader(prefix), seq_length, *index)
