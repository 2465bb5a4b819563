"""Comparing with the reference beside a run."""

from __future__ import annotations

import os
import signal
import time

import pytest

from phi1_megatron.data.check_process import CheckProcess, Compared
from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.engine import open_engine
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import DataError

CODE = "def f(x):\n        return x + 1\n"


@pytest.fixture(scope="module")
def definition() -> TokenizerDefinition:
    return train_bpe([CODE] * 20, 320).definition


@pytest.fixture(scope="module")
def ids(definition: TokenizerDefinition) -> list[int]:
    return open_engine(definition).encode([CODE]).ids.tolist()  # type: ignore[no-any-return]


def test_right_ids_are_counted(definition: TokenizerDefinition, ids: list[int]) -> None:
    aside = CheckProcess(definition)
    for _ in range(3):
        aside.compare([Compared("a.jsonl", CODE, ids)] * 2)
    assert aside.finish() == 6
    aside.compare([Compared("a.jsonl", CODE, ids[:-1])])  # too late to be looked at
    assert aside.finish() == 6
    aside.stop()


def test_a_difference_is_raised_without_waiting_for_the_end(
    definition: TokenizerDefinition, ids: list[int]
) -> None:
    aside = CheckProcess(definition)
    aside.compare([Compared("b.jsonl", CODE, [*ids[:-1], ids[-1] + 1])])

    def keep_asking() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            aside.compare([])
            time.sleep(0.01)

    with pytest.raises(DataError, match=r"a document of b\.jsonl is encoded otherwise"):
        keep_asking()
    aside.stop()


def test_a_process_that_is_killed_is_missed(
    definition: TokenizerDefinition, ids: list[int]
) -> None:
    aside = CheckProcess(definition)
    assert aside._process.pid is not None
    os.kill(aside._process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"compares ids .* ended with code -9"):
        aside.finish()
    aside.stop()
