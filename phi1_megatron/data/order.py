"""Which sample comes when: a pure function of the position in the run.

Position ``p`` counts samples over the whole run, from 0. Where it leads depends on the data sets'
sizes and weights and on the seed; not on the number of ranks, the micro batch, the length of the
run or how often it was restarted. So any rank can find its samples at any step without replaying
the steps before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from phi1_megatron.errors import DataError

BLOCK = 4096
"""Samples over which the blend keeps its proportions exactly, to within one sample a data set."""

_MASK64 = (1 << 64) - 1


def permute(index: int, size: int, key: int) -> int:
    """Where ``index`` goes in a shuffle of ``range(size)``; one shuffle for each ``key``.

    A four-round Feistel network over the next power of four, walked until it lands inside (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): a bijection that takes no memory,
    where a table would take 8 bytes for every sample on every rank.
    """
    if size < 2:
        return index
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right + (key << 32) + (turn << 58)) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 mixed out."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class SampleOrder:
    """The order of samples from a weighted blend of data sets, each read epoch after epoch.

    Args:
        sizes: samples in one epoch of each data set.
        weights: share of each data set, relative to each other.
        seed: of the blend and of the shuffle of every epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise DataError(f"every data set of a blend needs at least one sample; got {sizes}")
        self._sizes = list(sizes)
        self._shares = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
        self._seed = seed
        # Samples drawn of each data set before each block; grows as later blocks are asked for.
        self._drawn_before: list[npt.NDArray[np.int64]] = [np.zeros(len(sizes), dtype=np.int64)]
        self._block = lru_cache(maxsize=4)(self._build_block)

    def locate(self, position: int) -> tuple[int, int]:
        """The data set and the sample in it at ``position`` of the run."""
        if len(self._sizes) == 1:
            return 0, self._in_epochs(0, position)
        dataset_of, count_of = self._block(position // BLOCK)
        place = position % BLOCK
        dataset = int(dataset_of[place])
        return dataset, self._in_epochs(dataset, int(count_of[place]))

    def _in_epochs(self, dataset: int, count: int) -> int:
        """The sample read when ``count`` samples of this data set have been read before it."""
        epoch, index = divmod(count, self._sizes[dataset])
        key = _mix(self._seed * 1_000_003 + dataset * 8191 + epoch) >> 40
        return permute(index, self._sizes[dataset], key)

    def _build_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each place of a block: its data set, and how many of that came before in the run."""
        while len(self._drawn_before) <= block + 1:
            self._drawn_before.append(self._next_totals())
        before, after = self._drawn_before[block], self._drawn_before[block + 1]
        datasets = np.repeat(np.arange(len(self._sizes)), after - before)
        counts = np.concatenate([np.arange(b, a) for b, a in zip(before, after, strict=True)])
        mix = np.random.default_rng([self._seed, block]).permutation(BLOCK)
        # Within a block the data sets mix; each one's own samples keep their order.
        dataset_of = datasets[mix]
        count_of = np.empty(BLOCK, dtype=np.int64)
        count_of[np.argsort(dataset_of, kind="stable")] = counts
        return dataset_of, count_of

    def _next_totals(self) -> npt.NDArray[np.int64]:
        """Totals after one more block: as near the shares as whole samples allow."""
        before = self._drawn_before[-1]
        target = len(self._drawn_before) * BLOCK * self._shares
        take = np.maximum(np.floor(target - before), 0).astype(np.int64)
        while take.sum() > BLOCK:
            take[np.argmax(before + take - target)] -= 1
        while take.sum() < BLOCK:
            take[np.argmax(target - before - take)] += 1
        return before + take
