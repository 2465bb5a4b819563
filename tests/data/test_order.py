"""Which sample comes when: a pure function of position, sizes, weights and seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.data.order import BLOCK, SampleOrder, permute
from phi1_megatron.errors import DataError

weights_of = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=12)
seeds = st.integers(0, 2**40)


def located(order: SampleOrder, first: int, count: int) -> list[tuple[int, int]]:
    return [order.locate(position) for position in range(first, first + count)]


@given(size=st.integers(1, 600), key=st.integers(0, 2**24 - 1))
def test_a_shuffle_visits_every_index_once(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(2, 2**40), key=st.integers(0, 2**24 - 1), data=st.data())
def test_a_shuffle_of_any_size_stays_inside_it(size: int, key: int, data: st.DataObject) -> None:
    first, second = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    images = [permute(index, size, key) for index in (first, second)]
    assert all(0 <= image < size for image in images)
    assert (images[0] == images[1]) == (first == second)


def test_a_shuffle_is_neither_the_identity_nor_the_same_for_another_key() -> None:
    size = 1000
    first, second = ([permute(index, size, key) for index in range(size)] for key in (1, 2))
    for images, other in ((first, list(range(size))), (first, second)):
        alike = sum(a == b for a, b in zip(images, other, strict=True))
        assert alike < 20  # 1 is what chance gives


def test_neighbours_are_scattered_as_chance_would_scatter_them() -> None:
    size = 4000
    images = np.array([permute(index, size, 5) for index in range(size)])
    steps = np.abs(np.diff(images))
    assert abs(steps.mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.06
    # each tenth of the epoch draws from the whole data set
    for tenth in images.reshape(10, -1):
        counts = np.histogram(tenth, bins=10, range=(0, size))[0]
        assert counts.min() > 15
        assert counts.max() < 75


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 300), seed=seeds)
def test_one_data_set_is_read_whole_in_every_epoch_each_time_in_another_order(
    size: int, seed: int
) -> None:
    order = SampleOrder([size], [1.0], seed)
    epochs = [[index for _, index in located(order, epoch * size, size)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 20:
        assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None, max_examples=15)
@given(weights=weights_of, seed=seeds, data=st.data())
def test_each_data_set_of_a_blend_is_read_in_whole_epochs(
    weights: list[float], seed: int, data: st.DataObject
) -> None:
    sizes = [data.draw(st.integers(1, 3000)) for _ in weights]
    order = SampleOrder(sizes, weights, seed)
    read: list[list[int]] = [[] for _ in sizes]
    for dataset, index in located(order, 0, 2 * BLOCK):
        read[dataset].append(index)
    for size, indices in zip(sizes, read, strict=True):
        for start in range(0, len(indices), size):
            epoch = indices[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert all(0 <= index < size for index in epoch)
            if len(epoch) == size:
                assert sorted(epoch) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(weights=weights_of, blocks=st.integers(1, 12))
def test_a_blend_keeps_its_proportions_to_within_one_sample_a_data_set(
    weights: list[float], blocks: int
) -> None:
    order = SampleOrder([10] * len(weights), weights, seed=1)
    order.locate(blocks * BLOCK - 1)
    totals = np.array(order._drawn_before[: blocks + 1])
    assert (np.diff(totals, axis=0) >= 0).all()
    assert (totals.sum(axis=1) == np.arange(blocks + 1) * BLOCK).all()
    wanted = np.outer(np.arange(blocks + 1) * BLOCK, np.array(weights) / sum(weights))
    assert np.abs(totals - wanted).max() <= 1.0 + 1e-6


def test_what_is_located_has_the_proportions_that_are_planned() -> None:
    order = SampleOrder([50_000, 100, 7], [3.0, 0.9, 0.1], seed=4)
    counts = Counter(dataset for dataset, _ in located(order, 0, 3 * BLOCK))
    for dataset, share in enumerate((0.75, 0.225, 0.025)):
        assert abs(counts[dataset] - share * 3 * BLOCK) <= 1.0


def test_data_sets_are_mixed_within_a_block_and_not_read_one_after_the_other() -> None:
    order = SampleOrder([9000, 9000], [1.0, 1.0], seed=4)
    for start in range(0, BLOCK, 256):
        counts = Counter(dataset for dataset, _ in located(order, start, 256))
        assert 88 < counts[0] < 168  # 128, five standard deviations each way


@settings(deadline=None, max_examples=25)
@given(
    weights=weights_of,
    seed=seeds,
    positions=st.lists(st.integers(0, 20 * BLOCK), min_size=1, max_size=20),
)
def test_a_position_leads_to_the_same_sample_in_whatever_order_it_is_asked(
    weights: list[float], seed: int, positions: list[int]
) -> None:
    sizes = [7 + 100 * index for index in range(len(weights))]
    jumping = SampleOrder(sizes, weights, seed)
    jumped = {position: jumping.locate(position) for position in positions}
    walking = SampleOrder(sizes, weights, seed)
    assert {position: walking.locate(position) for position in sorted(positions)} == jumped


def test_a_fresh_order_finds_the_middle_of_a_sequential_one() -> None:
    sizes, weights = [300, 5000, 41], [0.2, 5.0, 1.0]
    whole = located(SampleOrder(sizes, weights, 9), 0, 3 * BLOCK)
    start = BLOCK + 1234
    assert located(SampleOrder(sizes, weights, 9), start, 2000) == whole[start : start + 2000]


def test_another_seed_is_another_order() -> None:
    for sizes, weights in (([5000], [1.0]), ([5000, 5000], [1.0, 1.0])):
        first, second = (located(SampleOrder(sizes, weights, seed), 0, 500) for seed in (1, 2))
        assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_two_data_sets_of_one_size_are_shuffled_differently() -> None:
    order = SampleOrder([1000, 1000], [1.0, 1.0], seed=3)
    read: list[list[int]] = [[], []]
    for dataset, index in located(order, 0, 1000):
        read[dataset].append(index)
    assert sum(a == b for a, b in zip(*read, strict=False)) < 20


def test_weights_are_relative() -> None:
    first, second = (SampleOrder([60, 60], weights, 1) for weights in ([1.0, 3.0], [2.0, 6.0]))
    assert located(first, 0, 500) == located(second, 0, 500)


@pytest.mark.parametrize("sizes", [[], [5, 0]])
def test_an_empty_data_set_is_refused(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        SampleOrder(sizes, [1.0] * len(sizes), 1)
