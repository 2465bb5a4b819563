"""``phi1 train`` as a person runs it: started, stopped, killed, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from phi1_megatron.checkpoint.folder import list_checkpoints
from phi1_megatron.config.load import to_toml
from tests.training.toy_data import toy_config, write_toy_data

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end]

TWO_RANKS = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")


def write_recipe(folder: Path, toy: str, **sections: Any) -> Path:
    fields: dict[str, Any] = {"parallel": TWO_RANKS, "training": {"train_steps": 8}}
    for name, more in sections.items():
        fields[name] = {**fields.get(name, {}), **more}
    recipe = folder / "toy.toml"
    recipe.write_text(to_toml(toy_config(toy, **fields)), encoding="utf-8")
    return recipe


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "phi1_megatron", *map(str, words)]


def phi1(*words: object, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **(environ or {})},
    )


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen[str]) -> None:
    metrics = run_dir / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
            return
        assert process.poll() is None, "it ended before it was to be stopped"
        time.sleep(0.05)
    pytest.fail(f"no {steps} steps within a minute")


def processes_of(run_dir: Path) -> list[int]:
    """Ranks of this run that are alive, by their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if str(run_dir).encode() in words and b"phi1_megatron" in words:
                found.append(int(entry.name))
    return found


def test_a_run_stopped_by_sigterm_saves_and_the_same_command_finishes_it_unchanged(
    toy: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, toy, training={"train_steps": 60})
    whole = phi1("train", recipe, "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        command("train", recipe, "--run-dir", stopped), stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(stopped, 2, process)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert complaint.splitlines() == [
        "phi1: stopped by SIGTERM; the ranks were told to save and end"
    ]
    (saved,) = list_checkpoints(stopped)
    assert saved.name < "step_00000060"
    again = phi1("train", recipe, "--run-dir", stopped)
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stdout
    assert losses(stopped) == losses(tmp_path / "whole")
    assert (stopped / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (stopped / "config.toml").read_text() == (tmp_path / "whole/config.toml").read_text()


def test_a_killed_rank_ends_the_run_at_once_and_is_named(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy, training={"train_steps": 5000})
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command("train", recipe, "--run-dir", run_dir), stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(run_dir, 2, process)
    ranks = sorted(pid for pid in processes_of(run_dir) if pid != process.pid)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in complaint
    assert "Traceback" not in complaint
    assert processes_of(run_dir) == []


def test_ranks_end_when_the_command_that_started_them_is_killed(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy, training={"train_steps": 5000})
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command("train", recipe, "--run-dir", run_dir), text=True)
    wait_for_steps(run_dir, 2, process)
    process.kill()
    process.wait()
    for _ in range(600):
        if not processes_of(run_dir):
            break
        time.sleep(0.05)
    assert processes_of(run_dir) == []
    assert list_checkpoints(run_dir), "they were told to save"


def test_a_failing_rank_leaves_one_sentence_and_its_traceback_in_one_file(
    toy: str, tmp_path: Path
) -> None:
    # No report lies beside the toy data, so the token is met only in training.
    recipe = write_recipe(
        tmp_path, toy, model={"vocab_size": 60, "make_vocab_size_divisible_by": 2}
    )
    run_dir = tmp_path / "run"
    failed = phi1("train", recipe, "--run-dir", run_dir)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("holds token") == 1
    assert "the model's vocabulary has 60 rows (0 to 59)" in failed.stderr
    assert "Traceback" in (run_dir / "failure.txt").read_text()
    assert list_checkpoints(run_dir) == []


def test_under_torchrun_each_process_takes_its_place(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy)
    direct = phi1("train", recipe, "--run-dir", tmp_path / "direct")
    assert direct.returncode == 0, direct.stderr
    words = ["--standalone", "--nproc-per-node", "2", "-m", "phi1_megatron", "train"]
    under = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words,
            recipe,
            "--run-dir",
            tmp_path / "under",
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert under.returncode == 0, under.stderr
    assert losses(tmp_path / "under") == losses(tmp_path / "direct")


@pytest.mark.parametrize(
    ("override", "code", "sentence"),
    [
        ("model.num_layer=3", 2, "did you mean model.num_layers?"),
        ("parallel.tensor_model_parallel_size=3", 2, "(4 / 3 = 1.33333)"),
        ("data.seq_length=64", 2, "data.seq_length 64 is longer than"),
        ("training.transformer_impl=transformer_engine", 2, "needs "),
        ("data.blend=['missing']", 1, "missing.idx does not exist"),
        ("checkpoint.initialize_from=missing", 1, "no checkpoint or run folder missing"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    override: str, code: int, sentence: str, toy: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, toy)
    refused = phi1("train", recipe, override, "--run-dir", tmp_path / "run")
    assert refused.returncode == code
    assert sentence in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_truncated_data_set_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    prefix = Path(write_toy_data(tmp_path / "toy"))
    binary = prefix.with_name("toy.bin")
    size = binary.stat().st_size
    with binary.open("r+b") as file:
        file.truncate(size - 100)
    recipe = write_recipe(tmp_path, str(prefix))
    refused = phi1("train", recipe, "--run-dir", tmp_path / "run")
    assert refused.returncode == 1
    assert f"holds {size - 100:,} bytes" in refused.stderr
    assert f"2 bytes = {size:,} bytes" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_too_few_processes_are_refused_with_the_arithmetic(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy)
    refused = phi1("train", recipe, "--run-dir", tmp_path / "run", "--num-processes", 1)
    assert refused.returncode == 2
    assert "1 ranks do not divide into copies of the model of 2 ranks each" in refused.stderr


def test_a_checkpoint_of_another_model_is_refused_by_its_field(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy)
    assert phi1("train", recipe, "--run-dir", tmp_path / "run").returncode == 0
    refused = phi1("train", recipe, "model.num_layers=2", "--run-dir", tmp_path / "run")
    assert refused.returncode == 1
    assert "its model.num_layers is 4, the recipe's 2" in refused.stderr


def test_debug_shows_the_traceback(toy: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, toy)
    shown = phi1("train", recipe, "model.num_layer=3", "--debug")
    assert "Traceback" in shown.stderr
