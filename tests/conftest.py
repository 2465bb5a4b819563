"""What every test stands on: no network, few threads, and the shared test data where it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before any test module imports a library that reads them; child processes inherit them.
# A test reaches no hub, and several ranks on a small machine do not fight over its cores.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree: recipes, tools and scripts are under it."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Test data too large for the repository: ``PHI1_TEST_DATA``, or ``shared/data`` beside it."""
    named = os.environ.get("PHI1_TEST_DATA")
    if named:
        if not Path(named).is_dir():
            pytest.fail(f"PHI1_TEST_DATA={named} is not a folder")
        return Path(named)
    beside = REPOSITORY.parent / "shared" / "data"
    if not beside.is_dir():
        pytest.skip("no shared test data beside the repository: set PHI1_TEST_DATA to its folder")
    return beside
