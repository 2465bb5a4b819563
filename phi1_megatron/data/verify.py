"""Read an indexed data set through and through, and name the first thing found wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phi1_megatron.data.indexed import IndexInfo, TokenReader
from phi1_megatron.errors import DataError

_CHUNK = 1 << 20  # sequences or tokens held at a time


def verify(prefix: str | Path, vocab_size: int | None = None) -> IndexInfo:
    """Read a data set through: pointers, document marks and, given ``vocab_size``, every id.

    Raises
    ------
    DataError
        The first thing found wrong, with its place.
    """
    reader = TokenReader(prefix)
    index, itemsize = reader.index, reader.index.dtype.itemsize
    pointer = 0
    for start in range(0, index.num_sequences, _CHUNK):
        lengths = index.sequence_lengths[start : start + _CHUNK].astype(np.int64)
        ends = pointer + np.cumsum(lengths) * itemsize
        begins = np.concatenate(([pointer], ends[:-1]))
        wrong = (lengths < 0) | (begins != index.sequence_pointers[start : start + _CHUNK])
        if wrong.any():
            raise DataError(
                f"{index.idx_path}: sequence {start + int(wrong.argmax()):,} does not begin where "
                "the one before it ends; preprocess the data set again."
            )
        pointer = int(ends[-1])
    marks = index.document_indices
    if marks[0] != 0 or marks[-1] != index.num_sequences or (np.diff(marks) < 0).any():
        raise DataError(
            f"{index.idx_path}: the document marks do not rise from 0 to {index.num_sequences:,} "
            "sequences; preprocess the data set again."
        )
    for start in range(0, index.num_tokens if vocab_size is not None else 0, _CHUNK):
        ids = reader.tokens[start : start + _CHUNK]
        bad = (ids < 0) | (ids >= vocab_size)
        if bad.any():
            at = int(bad.argmax())
            raise DataError(
                f"{index.bin_path}: token {start + at:,} is id {ids[at]}, outside the vocabulary "
                f"of {vocab_size:,}; it was written with another tokenizer or is damaged."
            )
    return index
