"""How long the documents of a data set are, from its index alone and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.indexed import IndexInfo
from phi1_megatron.errors import DataError

_CHUNK = 1 << 20  # documents held at a time
_LIMIT = 1 << 20  # lengths below it are counted, longer ones kept: few documents can be that long

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthBucket:
    """How many documents have ``low`` to ``high`` tokens."""

    low: int
    high: int
    documents: int


class DocumentLengths:
    """The tokens in each document of a data set, counted.

    Attributes
    ----------
    documents, tokens
        How many there are.
    """

    def __init__(self, index: IndexInfo) -> None:
        self._counts: Int64Array = np.zeros(_LIMIT, np.int64)
        long: list[Int64Array] = [np.empty(0, np.int64)]
        for lengths in _lengths(index):
            short = lengths < _LIMIT
            self._counts += np.bincount(lengths[short], minlength=_LIMIT)
            long.append(lengths[~short])
        self._long = np.sort(np.concatenate(long))
        self._below = np.cumsum(self._counts)
        self.documents = index.num_documents
        self.tokens = index.num_tokens

    def quantiles(self, shares: Sequence[float]) -> list[int]:
        """For each share from 0 to 1, the length that it of the documents do not exceed.

        Each is the length of a document, not a mean of two. Empty where there are no documents.
        """
        if not self.documents:
            return []
        ranks = [max(int(np.ceil(share * self.documents)) - 1, 0) for share in shares]
        counted = int(self._below[-1])
        return [
            int(np.searchsorted(self._below, rank, side="right"))
            if rank < counted
            else int(self._long[rank - counted])
            for rank in ranks
        ]

    def histogram(self) -> list[LengthBucket]:
        """Documents by powers of two, from the shortest to the longest; none is left out between.

        Documents without a token are a bucket of their own.
        """
        if not self.documents:
            return []
        least, most = self.quantiles([0.0, 1.0])
        buckets = []
        for bits in range(least.bit_length(), most.bit_length() + 1):
            low, end = (1 << bits) >> 1, 1 << bits
            counted = int(self._counts[low:end].sum())
            kept = int(np.searchsorted(self._long, end) - np.searchsorted(self._long, low))
            buckets.append(LengthBucket(low, end - 1, counted + kept))
        return buckets


def _lengths(index: IndexInfo) -> Iterator[Int64Array]:
    """The tokens in each document, a chunk of documents at a time."""
    size = index.num_tokens * index.dtype.itemsize
    for first in range(0, index.num_documents, _CHUNK):
        marks = index.document_indices[first : first + _CHUNK + 1]
        inside = (marks >= 0) & (marks <= index.num_sequences)
        begins = np.full(len(marks), size, np.int64)
        held = inside & (marks < index.num_sequences)
        begins[held] = index.sequence_pointers[marks[held]]
        lengths = np.diff(begins) // index.dtype.itemsize
        if not inside.all() or (lengths < 0).any():
            raise DataError(
                f"{index.idx_path}: the marks of documents {first:,} and up are not in order; "
                f"`phi1 data verify {index.prefix}` says where."
            )
        yield lengths
