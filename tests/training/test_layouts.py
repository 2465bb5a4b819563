"""Whatever the layout, the same model starts, and the same model comes out of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.initialize import (
    data_parallel_rank,
    parallel_context,
    tensor_parallel_rank,
)
from phi1_megatron.distributed.launch import Place
from phi1_megatron.models.phi1 import named_weights
from phi1_megatron.training.trainer import _batches, start, train_step
from tests.distributed_harness import LAYOUTS, run_ranks
from tests.models.test_parity import gather_shards, split_dimension
from tests.training.toy_data import toy_config

pytestmark = pytest.mark.distributed


def train_steps(place: Place, config: RunConfig, run_dir: Path, steps: int) -> dict[str, Any]:
    """A few real steps on one rank: losses, gradient norms, weights before and after."""

    def weights(chunks: Any) -> Any:
        return {
            name: (p.detach().float().clone(), split_dimension(p), tensor_parallel_rank())
            for name, p in named_weights(chunks)
        }

    with parallel_context(config, place if place.world_size > 1 else None) as layout:
        run = start(config, run_dir, layout)
        before = weights(run.state.chunks)
        batches = [_batches(run, run.data.training) for _ in run.state.chunks]
        history = [train_step(run, batches) for _ in range(steps)]
        return {
            "loss": [metrics.loss for metrics in history],
            "grad_norm": [metrics.grad_norm for metrics in history],
            "before": before,
            "after": weights(run.state.chunks),
            "data_rank": data_parallel_rank(),
        }


def train_layout(layout: str, toy: str, folder: Path, **sections: Any) -> dict[str, Any]:
    world_size, parallel = LAYOUTS.get(layout, (1, {}))
    # A key's bias shifts all scores of a row alike, so its gradient is rounding alone where it is
    # not rotated; Adam with a tiny epsilon would divide that rounding by itself.
    sections = {"optimizer": {"lr": 1e-2, "adam_eps": 1e-5}, **sections, "parallel": parallel}
    config = toy_config(toy, **sections)
    answers = run_ranks(world_size, train_steps, config, folder / layout, 5)
    return {
        "loss": answers[0]["loss"],
        "grad_norm": answers[0]["grad_norm"],
        "before": gather_shards([answer["before"] for answer in answers]),
        "after": gather_shards([answer["after"] for answer in answers]),
    }


@pytest.fixture(scope="module")
def one_process(toy_data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_layout("tp1", toy_data, tmp_path_factory.mktemp("tp1"))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_layout_starts_from_the_same_weights_and_trains_to_the_same_ones(
    layout: str, one_process: dict[str, Any], toy_data: str, tmp_path: Path
) -> None:
    trained = train_layout(layout, toy_data, tmp_path)
    assert trained["before"].keys() == one_process["before"].keys()
    for name, expected in one_process["before"].items():
        assert torch.equal(trained["before"][name], expected), f"{name} starts otherwise"
    assert trained["loss"] == pytest.approx(one_process["loss"], rel=1e-5)
    assert trained["grad_norm"] == pytest.approx(one_process["grad_norm"], rel=1e-4)
    for name, expected in one_process["after"].items():
        moved = torch.linalg.norm(expected - one_process["before"][name])
        difference = torch.linalg.norm(trained["after"][name] - expected)
        assert moved > 0, f"{name} was never updated"
        assert difference <= 1e-5 * torch.linalg.norm(expected), f"{name}: {difference:.2e}"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_tracks_fp32_with_tensor_and_sequence_parallelism(
    precision: str, one_process: dict[str, Any], toy_data: str, tmp_path: Path
) -> None:
    half = train_layout("tp2_sp", toy_data, tmp_path, training={"precision": precision})
    assert half["loss"] == pytest.approx(one_process["loss"], rel=5e-3)
    assert half["loss"] != one_process["loss"], "fp32 ran in place of half precision"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_nothing(
    recompute: str, one_process: dict[str, Any], toy_data: str, tmp_path: Path
) -> None:
    again = train_layout("tp2_sp", toy_data, tmp_path, training={"recompute": recompute})
    assert again["loss"] == pytest.approx(one_process["loss"], rel=1e-6)


def test_the_loss_falls_on_data_that_can_be_learnt(one_process: dict[str, Any]) -> None:
    assert one_process["loss"][-1] < one_process["loss"][0] - 0.3
