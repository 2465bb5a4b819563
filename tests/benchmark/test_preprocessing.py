"""The preprocessing benchmark: a whole run, small, with stand-ins for Megatron-LM's tools."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from phi1_megatron.benchmark import preprocessing
from phi1_megatron.benchmark.contenders import MegatronLM, contenders_beside_ours
from phi1_megatron.benchmark.outcome import MemoryCheck, Outcome, Row, cpu_model, machine_facts
from phi1_megatron.benchmark.plot import plot_speeds
from phi1_megatron.benchmark.preprocessing import Options, measure_preprocessing
from phi1_megatron.benchmark.process_tree import PeakMemory
from phi1_megatron.commands import benchmark
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import DataError, UsageError

LINES = ["def quack(n: int) -> str:\n    return 'quack' * n\n", "# é 世 🦆\nfor x in y:\n\tpass\n"]
BROKEN_TOOL = "raise ModuleNotFoundError(\"No module named 'duck'\")\n"
WRONG_TOOL = """\
import pathlib, shutil, sys
prefix = pathlib.Path(sys.argv[sys.argv.index("--output-prefix") + 1])
ours = prefix.parent.parent / "ours-0"
for suffix in (".bin", ".idx"):
    content = bytearray((ours / f"out_text_document{suffix}").read_bytes())
    if suffix == ".bin":
        content[1000] ^= 1
    pathlib.Path(f"{prefix}_text_document{suffix}").write_bytes(content)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, an input, and a checkout whose tools fail or write wrong bytes."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = json.loads(train_bpe(LINES * 5, 330).to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    with (folder / "in.jsonl").open("w") as out:
        for number in range(3000):
            text = f"{LINES[number % 2] * (1 + number % 3)}{number}"
            out.write(json.dumps({"text": text}) + "\n")
    tools = folder / "Megatron-LM" / "tools"
    tools.mkdir(parents=True)
    (tools / "preprocess_data.py").write_text(BROKEN_TOOL)
    (tools / "preprocess_data_fast.py").write_text(WRONG_TOOL)
    return folder


@pytest.fixture(scope="module")
def options(folder: Path) -> Options:
    return Options(
        vocab_file=folder / "vocab.json",
        merge_file=folder / "merges.txt",
        output=folder / "results",
        workers=2,
        input=folder / "in.jsonl",
        tokenizers=("gpt2",),
        repeats=2,
        slow_megabytes=0.1,
        memory_check=True,
        megatron_lm=MegatronLM(folder / "Megatron-LM", Path(sys.executable)),
        timeout_seconds=100,
    )


@pytest.fixture(scope="module")
def watched() -> list[str]:
    return []


@pytest.fixture(scope="module")
def outcome(options: Options, watched: list[str]) -> Outcome:
    return measure_preprocessing(options, lambda what, _: watched.append(what))


def row(outcome: Outcome, key: str) -> Row:
    return next(row for row in outcome.rows if row.key == key)


def test_ours_is_timed_as_often_as_asked_and_measured_apart(outcome: Outcome) -> None:
    ours = row(outcome, "ours")
    assert ours.failure is None
    assert len(ours.seconds) == len(ours.processor_seconds) == 2
    assert ours.memory is not None
    assert not ours.memory_in_timed_run
    assert ours.memory.rss_bytes > 20e6
    assert outcome.times_faster(ours) == 1


def test_hugging_face_writes_our_bytes(outcome: Outcome) -> None:
    theirs = row(outcome, "huggingface")
    assert theirs.failure is None
    assert theirs.compared
    assert theirs.difference is None
    assert len(theirs.seconds) == 1
    assert theirs.memory_in_timed_run


def test_a_slow_peer_s_smaller_share_is_said_and_compared_with_ours_on_the_same(
    outcome: Outcome,
) -> None:
    theirs = row(outcome, "huggingface")
    assert 0 < theirs.megabytes < 0.11 < outcome.input_megabytes
    assert any("Rows marked 0.1 MB ran on that beginning" in note for note in outcome.notes())
    assert outcome.label(theirs) == "HF tokenizers (0.1 MB)"
    whole, part = (r for r in outcome.rows if r.is_ours)
    assert (whole.megabytes, part.megabytes) == (outcome.input_megabytes, theirs.megabytes)
    assert theirs.digests == part.digests != whole.digests
    assert theirs.median_seconds is not None
    assert part.median_seconds is not None
    assert outcome.times_faster(theirs) == theirs.median_seconds / part.median_seconds


def test_a_changed_byte_is_noticed_and_makes_the_outcome_unsound(outcome: Outcome) -> None:
    wrong = row(outcome, "megatron_lm_fast")
    assert wrong.failure is None
    assert wrong.difference is not None
    assert "the .bin differs from byte 1,000 on" in wrong.difference
    assert not outcome.is_sound
    rest = tuple(r for r in outcome.rows if r is not wrong)
    assert replace(outcome, rows=rest).is_sound  # a peer's failure alone is no fault of ours


def test_a_failing_peer_is_a_row_with_its_reason(outcome: Outcome, options: Options) -> None:
    broken = row(outcome, "megatron_lm")
    assert broken.seconds == ()
    assert broken.failure is not None
    assert broken.failure.startswith("ModuleNotFoundError: No module named 'duck'")
    kept = options.output / "gpt2-megatron_lm.stderr.txt"
    assert kept.name in broken.failure
    assert kept.read_text().startswith("Traceback")


def test_memory_is_looked_at_with_the_input_ten_times_over(outcome: Outcome) -> None:
    (check,) = outcome.memory_checks
    assert check.failure is None
    assert check.repeated is not None
    assert check.times == 10


def test_nothing_large_stays_behind(outcome: Outcome, options: Options, folder: Path) -> None:
    assert [path.name for path in options.output.iterdir()] == ["gpt2-megatron_lm.stderr.txt"]
    assert outcome.input_documents == 3000
    assert not [p.pid for p in psutil.process_iter() if str(folder) in " ".join(words(p))]


def words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_every_run_is_announced(outcome: Outcome, watched: list[str]) -> None:
    assert outcome.rows
    for told in ("phi1 preprocess, run 2 of 2", "HF tokenizers, warming up", "10 times over"):
        assert any(told in line for line in watched)


def test_the_json_holds_figures_versions_and_command_lines(
    outcome: Outcome, tmp_path: Path
) -> None:
    outcome.write(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    ours = content["rows"][0]
    assert ours["megabytes_per_second"] == pytest.approx(
        outcome.input_megabytes / ours["median_seconds"]
    )
    assert ours["command"][1:4] == ["-m", "phi1_megatron", "preprocess"]
    assert len(ours["digests"][".bin"]) == 64
    assert content["rows"][2]["ours_is_times_faster"] > 0
    assert {"tokenizers", "megatron-core", "megatron_lm_commit"} <= set(content["versions"])
    assert content["machine"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert content["notes"] == outcome.notes()


def test_the_picture_is_a_png(outcome: Outcome, tmp_path: Path) -> None:
    plot_speeds(outcome, tmp_path / "speeds.png")
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["speeds.png"]
    plot_speeds(replace(outcome, rows=()), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def slow_row(key: str, name: str, **figures: object) -> Row:
    memory = PeakMemory(12_345_000_000, 23_456_000_000, 0.1)
    made = Row("codegen", key, name, ("x",), 123_456.7, 10**9, (98765.4,), memory=memory)
    return replace(made, **figures)  # type: ignore[arg-type]


@pytest.fixture
def wide() -> Outcome:
    """Everything that can be printed, with long figures and words."""
    long_reason = "ModuleNotFoundError: No module named " + "duck" * 40
    rows = (
        slow_row("ours", "phi1 preprocess", seconds=(0.123,)),
        slow_row("ours", "phi1 preprocess", megabytes=1234.5),
        slow_row("huggingface", "HF tokenizers", megabytes=1234.5, compared=True),
        slow_row("megatron_lm", "Megatron-LM", failure=long_reason),
        slow_row(
            "megatron_lm_fast",
            "Megatron-LM fast",
            megabytes=1234.5,
            compared=True,
            difference="the .bin differs from byte 12,345,678,901 on",
        ),
    )
    memory = rows[0].memory
    return Outcome(
        input_description="a_corpus_with_quite_a_long_name_of_its_own.jsonl",
        input_megabytes=123_456.7,
        input_wanted_megabytes=200_000,
        input_documents=10**9,
        input_sha256="0" * 64,
        workers=128,
        repeats=3,
        load_before=99.0,
        machine=machine_facts() | {"cpu": "AMD EPYC 9965 192-Core Processor with a long name"},
        versions={},
        rows=rows,
        memory_checks=(MemoryCheck("codegen", 10, memory, memory),),
    )


def printed(outcome: Outcome) -> str:
    console = Console(file=io.StringIO(), width=80)
    benchmark.show(outcome, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_that_is_printed_fits_80_columns_and_loses_nothing(wide: Outcome) -> None:
    text = printed(wide)
    assert max(map(len, text.splitlines())) <= 80
    for told in (
        "98,765.40",
        "12,345 / 23,456",
        "failed",
        "HF tokenizers",
        "not idle",
        "Only 123,456.7 MB",
    ):
        assert told in text
    assert "…" not in text


def test_a_difference_is_loud(wide: Outcome) -> None:
    text = printed(wide)
    assert "NO" in text
    assert "OTHER BYTES: codegen: Megatron-LM fast (1,234 MB): the .bin differs" in " ".join(
        text.split()
    )


def run_command(
    outcome: Outcome, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessing, "measure_preprocessing", lambda *_: outcome)
    output.mkdir()
    benchmark.preprocess(
        vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt", output=output
    )


def test_the_command_exits_with_1_where_bytes_differ_and_writes_its_results_all_the_same(
    wide: Outcome, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(wide, folder, tmp_path / "out", monkeypatch)
    assert ended.value.code == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "results.png"}


def test_the_command_ends_well_where_only_a_peer_failed(
    wide: Outcome, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_command(replace(wide, rows=wide.rows[:4]), folder, tmp_path / "out", monkeypatch)


def test_an_interrupt_leaves_no_process_and_no_data(folder: Path, tmp_path: Path) -> None:
    words_of_command = [
        *(sys.executable, "-m", "phi1_megatron", "benchmark", "preprocess"),
        *("--vocab-file", str(folder / "vocab.json")),
        *("--merge-file", str(folder / "merges.txt")),
        *("--input", str(folder / "in.jsonl"), "--output", str(tmp_path / "out")),
        *("--tokenizers", "gpt2", "--repeats", "1"),
    ]
    started = subprocess.Popen(words_of_command, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    for line in started.stderr:
        if "HF tokenizers, warming up" in line:
            break
    time.sleep(0.3)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=30) == 130
    started.stderr.close()
    assert list((tmp_path / "out").iterdir()) == []
    assert not [p.pid for p in psutil.process_iter() if str(tmp_path) in " ".join(words(p))]


def test_nobody_is_held_back_by_this_process_s_environment(
    monkeypatch: pytest.MonkeyPatch, folder: Path, options: Options
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    for peer in contenders_beside_ours("gpt2", folder, "<|eod|>", 7, options.megatron_lm):
        assert "TOKENIZERS_PARALLELISM" not in peer.environment
        several = peer.environment.get("RAYON_NUM_THREADS") == "7"
        assert several or peer.arguments[-2:] == ("--workers", "7")


def test_an_older_checkout_without_the_fast_tool_is_a_row_that_says_so(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "preprocess_data.py").touch()
    older = MegatronLM(tmp_path, Path(sys.executable))
    fast = contenders_beside_ours("gpt2", folder, "<|eod|>", 1, older)[-1]
    assert fast.absent == "this checkout has no tools/preprocess_data_fast.py"


def test_what_cannot_be_measured_is_refused_in_one_sentence(
    options: Options, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"holds no tools/preprocess_data\.py"):
        MegatronLM(tmp_path, Path(sys.executable))
    with pytest.raises(UsageError, match="--slow-megabytes -1 must be more than 0"):
        replace(options, slow_megabytes=-1)
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        measure_preprocessing(
            replace(options, vocab_file=tmp_path / "absent.json"), lambda *_: None
        )


def test_the_processor_is_named_where_the_kernel_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Duck 3000\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Duck 3000"
    assert cpu_model(tmp_path / "absent") == os.uname().machine
