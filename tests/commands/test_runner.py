"""The process that preprocesses while another reads the command line and shows progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi1_megatron.data.tokenizer import train_bpe

TEXTS = [f"def f{n}(x):\n    return x * {n}\n" * 9 for n in range(300)]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 400
    )
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(TEXTS, 400).definition.content)
    return [
        sys.executable, "-m", "phi1_megatron", "preprocess", "--input", str(tmp_path / "in.jsonl"),
        "--output-prefix", str(tmp_path / "out" / "x"), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(tmp_path / "tokenizer.json"), "--append-eod", "--workers", "2",
    ]  # fmt: skip


def processes(session: int) -> list[int]:
    """The processes of a session, however deep."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def begun(command: list[str], repository: Path, out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(repository)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("x.parts/*.record")) and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_ends_every_process_and_the_next_run_goes_on(
    command: list[str],
    repository: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    whole_group: bool,
) -> None:
    process = begun(command, repository, tmp_path / "out")
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 10
    while processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(process.pid) == []
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "finished shards were there and used" in done.stdout


def test_the_working_process_that_is_killed_is_missed(
    command: list[str], repository: Path, tmp_path: Path
) -> None:
    process = begun(command, repository, tmp_path / "out")
    runner = next(
        pid
        for pid in processes(process.pid)
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)
    )
    os.kill(runner, signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("words", [["--help"], ["--inptu"], []])
def test_a_command_line_that_asks_for_no_work_leaves_no_process(
    repository: Path, words: list[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "phi1_megatron", "preprocess", *words],
        env={**os.environ, "PYTHONPATH": str(repository)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == (0 if words == ["--help"] else 2)
    assert "Traceback" not in stdout + stderr
    deadline = time.monotonic() + 10
    while processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(process.pid) == []
