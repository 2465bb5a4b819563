"""Worker processes: order, bounded run-ahead, and failures that say who, how and on what."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from phi1_megatron.data.worker_pool import WorkerPool
from phi1_megatron.errors import DataError


def test_results_keep_the_order_though_the_first_item_is_the_slowest() -> None:
    taken: list[float] = []

    def source() -> Iterator[float]:
        for seconds in [0.5] + [0.0] * 30:
            taken.append(seconds)
            yield seconds

    with WorkerPool(time.sleep, 2) as pool:
        results = pool.map(source(), place=str)
        first = next(results)
        # What is read while the first item is under way is bounded, or memory would not be.
        assert len(taken) <= 8
        assert [item for item, _ in (first, *results)] == [0.5] + [0.0] * 30


def test_an_exception_in_a_worker_comes_with_its_traceback_and_place() -> None:
    with (
        WorkerPool(len, 2) as pool,
        pytest.raises(RuntimeError, match=r"1 of 2 failed on item 5:[\s\S]*TypeError") as e,
    ):
        list(pool.map([5], place=lambda item: f"item {item}"))
    assert "Traceback" in str(e.value)


def test_a_worker_that_exits_is_named_with_its_code_and_place() -> None:
    with (
        WorkerPool(os._exit, 1) as pool,
        pytest.raises(
            DataError,
            match=r"worker 1 of 1 \(process \d+\) exited with code 3 while it encoded row 7",
        ),
    ):
        list(pool.map([3], place=lambda item: "row 7"))
