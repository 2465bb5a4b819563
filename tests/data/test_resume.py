"""Preprocessing that is killed, starved of disk or asked for something else, and goes on."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi1_megatron.data import assembly as assembly_room
from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from phi1_megatron.data.report import read_report
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import DataError

TEXTS = [f"def f{n}(x):\n    return x * {n}  # {n * 7919 % 101}\n" * 5 for n in range(400)]


class Killed(BaseException):
    """Stands for a kill: nothing that tidies up after an Exception sees it."""


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerDefinition:
    return train_bpe(TEXTS, 500).definition


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[137] = "nonsense"
    path.write_text("\n".join(rows))
    return path


def options(corpus: Path, tokenizer: TokenizerDefinition, name: str, **more: Any) -> Any:
    settings = {"append_eod": True, "workers": 1, "shard_bytes": 4000, **more}
    return PreprocessOptions((str(corpus),), corpus.parent / name / "x", tokenizer, **settings)


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file; of reports what must be the same however the run went."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".report.json"):
            report = read_report(path.with_name(path.name.removesuffix(".report.json")))
            assert report is not None
            told = replace(report, seconds=0.0, workers=0, chunks=(), checked_documents=0)
            found[path.name] = repr(replace(told, input_hashes={})).encode()
        else:
            found[path.name] = path.read_bytes()
    return found


def stop_after(shards: int) -> Any:
    seen = []

    def on_progress(done: int, *rest: int) -> None:
        seen.append(done)
        if len(seen) > shards:
            raise Killed

    return on_progress


@pytest.mark.parametrize("sync_bytes", [1, 3000, 1 << 40])
def test_a_run_stopped_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    corpus: Path,
    tokenizer: TokenizerDefinition,
    sync_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preprocess(options(corpus, tokenizer, "whole"))
    monkeypatch.setattr(assembly_room, "_SYNC_BYTES", sync_bytes)
    for shards in (3, 1, 7, 12, 2):
        with pytest.raises(Killed):
            preprocess(options(corpus, tokenizer, "stopped"), stop_after(shards))
    report = preprocess(options(corpus, tokenizer, "stopped"))
    assert report.resumed_shards >= 12
    assert outcome(corpus.parent / "stopped") == outcome(corpus.parent / "whole")


def test_a_run_killed_between_any_two_steps_of_its_last_renames_is_finished_by_the_next(
    corpus: Path, tokenizer: TokenizerDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = preprocess(options(corpus, tokenizer, "whole"))
    # The renames that write progress and the list itself come before; 4 bring files into place.
    for fatal in range(1, 5):
        name = f"killed{fatal}"
        moved: list[Path] = []
        rename = Path.replace

        def dying(
            path: Path,
            target: Any,
            *,
            moved: list[Path] = moved,
            fatal: int = fatal,
            rename: Any = rename,
        ) -> Path:
            if not str(target).endswith((".json.partial", "renames.json", "manifest.json")) and (
                Path(target).parent.name == path.parent.parent.name
            ):
                moved.append(path)
                if len(moved) == fatal:
                    raise Killed
            return rename(path, target)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(Killed):
                preprocess(options(corpus, tokenizer, name))
        assert not (corpus.parent / name / "x_text_document.idx").exists() or fatal > 2
        again = preprocess(options(corpus, tokenizer, name))
        assert outcome(corpus.parent / name) == outcome(corpus.parent / "whole")
        assert again.datasets[0].tokens == expected.datasets[0].tokens


def test_an_input_that_changed_without_changing_its_size_is_refused_by_name(
    corpus: Path, tokenizer: TokenizerDefinition
) -> None:
    with pytest.raises(Killed):
        preprocess(options(corpus, tokenizer, "out"), stop_after(3))
    stamps = corpus.stat()
    corpus.write_text(corpus.read_text().replace("def f1(", "def g1("))
    os.utime(corpus, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    with pytest.raises(DataError, match=r"corpus\.jsonl has changed since this run was begun"):
        preprocess(options(corpus, tokenizer, "out"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"append_eod": False}, "--append-eod true, and now --append-eod is false"),
        ({"json_keys": ("text", "more")}, "--json-keys text, and now --json-keys is text more"),
        ({"max_line_bytes": 99999}, "--max-line-bytes"),
    ],
)
def test_other_options_are_refused_by_name(
    corpus: Path, tokenizer: TokenizerDefinition, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(Killed):
        preprocess(options(corpus, tokenizer, "out"), stop_after(3))
    with pytest.raises(DataError, match=told):
        preprocess(options(corpus, tokenizer, "out", **change))
    preprocess(options(corpus, tokenizer, "out"))


def test_another_tokenizer_or_a_grown_input_is_refused(
    corpus: Path, tokenizer: TokenizerDefinition
) -> None:
    with pytest.raises(Killed):
        preprocess(options(corpus, tokenizer, "out"), stop_after(3))
    other = train_bpe(TEXTS, 450).definition
    with pytest.raises(DataError, match="begun with the tokenizer"):
        preprocess(options(corpus, other, "out"))
    with corpus.open("a") as file:
        file.write('\n{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl held [\d,]+ bytes, not"):
        preprocess(options(corpus, tokenizer, "out"))


def test_a_part_that_lost_its_bytes_is_made_again(
    corpus: Path, tokenizer: TokenizerDefinition
) -> None:
    preprocess(options(corpus, tokenizer, "whole"))
    with pytest.raises(Killed):
        preprocess(options(corpus, tokenizer, "out"), stop_after(6))
    parts = sorted((corpus.parent / "out" / "x.parts").glob("shard-*.bin"))
    parts[1].write_bytes(bytes(parts[1].stat().st_size))  # as a machine that lost power may
    parts[2].unlink()
    preprocess(options(corpus, tokenizer, "out"))
    assert outcome(corpus.parent / "out") == outcome(corpus.parent / "whole")


def test_strict_looks_again_at_shards_whose_bad_rows_were_passed_over(
    corpus: Path, tokenizer: TokenizerDefinition
) -> None:
    with pytest.raises(Killed):
        preprocess(options(corpus, tokenizer, "out"), stop_after(12))
    with pytest.raises(DataError, match="line 138: broken JSON"):
        preprocess(options(corpus, tokenizer, "out", strict=True))


def test_a_second_run_of_the_same_output_is_refused(
    corpus: Path, tokenizer: TokenizerDefinition
) -> None:
    def second(*progress: int) -> None:
        with pytest.raises(DataError, match=r"x\.parts is in use by process \d+"):
            preprocess(options(corpus, tokenizer, "out"))

    preprocess(options(corpus, tokenizer, "out"), second)


def start(repository: Path, corpus: Path, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    tool = repository / "tools" / "preprocess" / "preprocess_data.py"
    return subprocess.Popen(
        [sys.executable, str(tool), "--input", str(corpus), "--output-prefix", str(out / "x"),
         "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder),
         "--workers", "2", "--append-eod"],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.jsonl"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    path.write_text(rows * 300)  # 24 MB: a second or so
    return path


def test_kill_9_at_random_moments_costs_nothing_but_time(
    repository: Path, tokenizer: TokenizerDefinition, large: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    began = time.monotonic()
    assert start(repository, large, folder, tmp_path / "whole").wait(timeout=120) == 0
    seconds = time.monotonic() - began
    moments = random.Random(os.getpid())
    kills = finished = 0
    out = tmp_path / "out"
    while not finished:
        process = start(repository, large, folder, out)
        try:
            moment = moments.uniform(0.3, 0.9) * seconds if kills < 6 else 120
            finished = process.wait(timeout=moment) == 0
            assert finished or kills >= 6, "the tool failed by itself"
        except subprocess.TimeoutExpired:
            # Sometimes the parent alone: its workers must end by themselves.
            if kills % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            kills += 1
    assert kills, f"never killed within {seconds:.1f} s"
    assert outcome(out) == outcome(tmp_path / "whole")


def test_sigterm_ends_the_run_and_keeps_what_is_done(
    repository: Path, tokenizer: TokenizerDefinition, large: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    out = tmp_path / "out"
    process = start(repository, large, folder, out)
    deadline = time.monotonic() + 60
    while not list(out.glob("x.parts/*.record")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [path.name for path in out.iterdir()] == ["x.parts"]
    assert start(repository, large, folder, out).wait(timeout=120) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "x_text_document.bin",
        "x_text_document.idx",
        "x_text_document.report.json",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full_is_one_sentence_and_the_next_run_goes_on(
    corpus: Path, tokenizer: TokenizerDefinition, workers: int
) -> None:
    preprocess(options(corpus, tokenizer, "whole"))
    size = (corpus.parent / "whole" / "x_text_document.bin").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel lets no file grow beyond half of the data set, as if the disk were full there.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(DataError, match=r"could not be written.*File too large"):
            preprocess(options(corpus, tokenizer, "out", workers=workers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (corpus.parent / "out").iterdir()] == ["x.parts"]
    preprocess(options(corpus, tokenizer, "out", workers=workers))
    assert outcome(corpus.parent / "out") == outcome(corpus.parent / "whole")
