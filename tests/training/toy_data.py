"""A small data set with something to learn, and runs over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.indexed import IndexedDatasetWriter
from tests.distributed_harness import tiny_config


def write_toy_data(prefix: Path, documents: int = 60, seed: int = 5) -> str:
    """Documents that count upwards in threes from a random start, below 100."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            start, length = generator.integers(0, 100), generator.integers(40, 90)
            writer.add_document(((start + 3 * np.arange(length)) % 100).astype(np.uint16))
    return str(prefix)


def toy_config(prefix: str, **sections: dict[str, Any]) -> RunConfig:
    sections.setdefault("data", {})["blend"] = [prefix]
    return tiny_config(**sections)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")
