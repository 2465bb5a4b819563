"""A run that was stopped and went on equals one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from phi1_megatron.checkpoint.folder import check_resumable, checkpoint_path, list_checkpoints
from phi1_megatron.checkpoint.weights import open_weights
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.launch import Place
from phi1_megatron.errors import CheckpointError
from phi1_megatron.training.trainer import TrainingError, train
from tests.distributed_harness import LAYOUTS, run_ranks
from tests.training.toy_data import toy_config

pytestmark = pytest.mark.distributed

DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def run_to_the_end(place: Place, config: RunConfig, run_dir: Path) -> None:
    train(config, run_dir, place if place.world_size > 1 else None)


def config_for(layout: str, toy: str, **sections: Any) -> tuple[int, RunConfig]:
    world_size, parallel = LAYOUTS.get(layout, (1, {}))
    fields: dict[str, Any] = {
        "parallel": parallel,
        "training": {"train_steps": 6, "eval_interval": 3, "eval_steps": 1},
        "checkpoint": {"save_interval": 3, "keep_last": 5},
    }
    for name, more in sections.items():
        fields[name] = {**fields.get(name, {}), **more}
    return world_size, toy_config(toy, **fields)


def run(layout: str, run_dir: Path, toy: str, **sections: Any) -> list[dict[str, Any]]:
    world_size, config = config_for(layout, toy, **sections)
    run_ranks(world_size, run_to_the_end, config, run_dir)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def stopped_after_step_3(whole: Path, copy: Path) -> Path:
    """A copy of a finished run as a crash after its middle checkpoint would have left it."""
    shutil.copytree(whole, copy)
    shutil.rmtree(checkpoint_path(copy, 6))
    return copy


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "tokens_per_second"}


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("tp2_sp", "fp32"), ("dp2", "fp16"), ("pp2_vpp2", "fp32"), ("dp2_plain_optimizer", "bf16")],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    layout: str, precision: str, toy_data: str, tmp_path: Path
) -> None:
    sections = {"model": DROPOUT, "training": {"precision": precision}}
    whole = run(layout, tmp_path / "whole", toy_data, **sections)
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    copy = stopped_after_step_3(tmp_path / "whole", tmp_path / "copy")
    resumed = run(layout, copy, toy_data, **sections)
    assert [numbers(line) for line in resumed] == [numbers(line) for line in whole]


def test_a_checkpoint_has_the_newest_weights_while_their_gathering_is_overlapped(
    toy_data: str, tmp_path: Path
) -> None:
    # Validating would gather them; so nothing but the save itself may.
    training = {"eval_interval": 0}
    whole = run("dp2", tmp_path / "whole", toy_data, training=training)
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    sections = {"parallel": overlap, "training": training}
    overlapped = run("dp2", tmp_path / "overlapped", toy_data, **sections)
    saved = [open_weights(checkpoint_path(tmp_path / name, 3)) for name in ("whole", "overlapped")]
    for name in saved[0].names():
        assert torch.equal(saved[0].read(name), saved[1].read(name)), f"{name} is an older one"
    copy = stopped_after_step_3(tmp_path / "overlapped", tmp_path / "copy")
    resumed = run("dp2", copy, toy_data, **sections)
    expected = [numbers(line) for line in whole]
    assert [numbers(line) for line in overlapped] == expected
    assert [numbers(line) for line in resumed] == expected


def test_a_run_goes_on_in_another_layout_with_the_same_losses(
    toy_data: str, tmp_path: Path
) -> None:
    whole = run("tp2_sp", tmp_path / "whole", toy_data)
    for layout in ("tp1", "pp2_vpp2", "dp2"):
        copy = stopped_after_step_3(tmp_path / "whole", tmp_path / layout)
        resumed = run(layout, copy, toy_data)
        losses = [line["loss"] for line in resumed]
        assert losses == pytest.approx([line["loss"] for line in whole], rel=1e-6)


def test_a_finished_run_started_again_leaves_its_record_as_it_was(
    toy_data: str, tmp_path: Path
) -> None:
    once = run("tp1", tmp_path / "run", toy_data)
    assert run("tp1", tmp_path / "run", toy_data) == once


def test_a_resumed_run_follows_its_recipe_where_that_has_changed(
    toy_data: str, tmp_path: Path
) -> None:
    run("tp1", tmp_path / "run", toy_data)
    longer = run(
        "tp1",
        tmp_path / "run",
        toy_data,
        training={"train_steps": 8},
        optimizer={"lr": 1e-3},
        scheduler={"decay_style": "constant", "warmup_steps": 1},
    )
    assert [line["learning_rate"] for line in longer[6:]] == [1e-3, 1e-3]


def test_a_run_that_overflows_at_the_smallest_loss_scale_gives_up(
    toy_data: str, tmp_path: Path
) -> None:
    _, config = config_for(
        "tp1",
        toy_data,
        training={
            "precision": "fp16",
            "train_steps": 40,
            "initial_loss_scale": 1e30,
            "min_loss_scale": 1e30,
            "eval_interval": 0,
        },
    )
    (message,) = run_ranks(1, fails_with, config, tmp_path / "run")
    assert "20 steps in a row overflowed" in message
    assert "the last of them step 20" in message


def test_a_save_leaves_no_process_behind_that_would_outlive_a_killed_rank(
    toy_data: str, tmp_path: Path
) -> None:
    world_size, config = config_for("dp2", toy_data)
    assert run_ranks(world_size, children_after_training, config, tmp_path / "run") == [[], []]


def children_after_training(place: Place, config: RunConfig, run_dir: Path) -> list[str]:
    run_to_the_end(place, config, run_dir)
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


def test_a_save_that_runs_out_of_disk_names_the_cause_and_leaves_the_older_checkpoint_alone(
    toy_data: str, tmp_path: Path
) -> None:
    _, config = config_for("tp1", toy_data, training={"eval_interval": 0})
    (message,) = run_ranks(1, fills_the_disk_at_the_second_save, config, tmp_path / "run")
    assert "step_00000006 could not be written: [Errno 28] No space left on device" in message
    assert "Traceback" not in message
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step_00000003"]


def fills_the_disk_at_the_second_save(place: Place, config: RunConfig, run_dir: Path) -> str:
    """megatron-core's writer reports a worker's error from all ranks, in torch's own exception."""
    save = dist_checkpointing.save

    def full(sharded: Any, folder: str) -> None:
        if "step_00000006" not in folder:
            save(sharded, folder)
            return
        (Path(folder) / "__0_0.distcp").write_bytes(b"half a shard")
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise CheckpointException("write", {0: (error, traceback.StackSummary())})

    dist_checkpointing.save = full
    with pytest.raises(CheckpointError) as raised:
        train(config, run_dir, None)
    return str(raised.value)


def fails_with(place: Place, config: RunConfig, run_dir: Path) -> str:
    with pytest.raises(TrainingError) as raised:
        train(config, run_dir, None)
    return str(raised.value)


def test_finetuning_starts_from_the_weights_of_another_run_and_step_one(
    toy_data: str, tmp_path: Path
) -> None:
    base = run("tp2_sp", tmp_path / "base", toy_data)
    tuned = run(
        "dp2", tmp_path / "tuned", toy_data, checkpoint={"initialize_from": str(tmp_path / "base")}
    )
    assert tuned[0]["step"] == 1
    assert tuned[0]["loss"] < base[0]["loss"] - 0.3


def test_old_checkpoints_go_and_the_newest_stay(toy_data: str, tmp_path: Path) -> None:
    checkpoint = {"save_interval": 1, "keep_last": 2}
    run("tp1", tmp_path / "run", toy_data, checkpoint=checkpoint)
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["step_00000005", "step_00000006"]


def test_other_data_or_another_batch_is_refused_by_name(toy_data: str, tmp_path: Path) -> None:
    run("tp1", tmp_path / "run", toy_data)
    _, changed = config_for("tp1", toy_data, training={"global_batch_size": 4})
    with pytest.raises(CheckpointError, match=r"training\.global_batch_size = 8; with 4"):
        check_resumable(tmp_path / "run", changed)
    _, changed = config_for("tp1", toy_data, data={"split": [70.0, 30.0, 0.0]})
    with pytest.raises(CheckpointError, match=r"data\.split"):
        check_resumable(tmp_path / "run", changed)
