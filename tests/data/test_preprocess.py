"""Preprocessing from documents to data set: the tokens, the report, and every way to fail."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi1_megatron.data import indexed
from phi1_megatron.data.indexed import TokenReader
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from phi1_megatron.data.report import entropy_nats, read_report
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe
from phi1_megatron.errors import DataError, UsageError

TEXTS = [f"def f{n}(x):\n    return x * {n}  # 世界 {n * 7919 % 101}\n" * 5 for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    return Tokenizer.load(train_bpe(TEXTS, 500).save(folder))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def options(corpus: Path, tokenizer: Tokenizer, name: str = "out", **more: Any) -> Any:
    settings = {"append_eod": True, "workers": 1, **more}
    definition = replace(tokenizer.definition, literal_eod=settings.pop("literal_eod", "eod"))
    return PreprocessOptions((str(corpus),), corpus.parent / name / "x", definition, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: b"" if path.is_dir() else path.read_bytes() for path in sorted(folder.iterdir())
    }


def test_megatron_core_reads_the_ids_that_transformers_gives(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    report = preprocess(options(corpus, tokenizer))
    reference = AutoTokenizer.from_pretrained(tokenizer.save(tmp_path / "tokenizer"))
    written = IndexedDataset(str(report.prefixes[0]))
    assert report.prefixes[0].name == "x_text_document"
    assert len(written) == len(TEXTS)
    for ids, text in zip(written, TEXTS, strict=True):
        assert ids.tolist() == [*reference(text)["input_ids"], reference.eos_token_id]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    corpus: Path, tokenizer: Tokenizer, workers: int
) -> None:
    alone = preprocess(options(corpus, tokenizer, "alone", shard_bytes=2000))
    together = preprocess(options(corpus, tokenizer, "together", workers=workers, shard_bytes=3000))
    assert together.datasets[0].workers == workers
    for suffix in (".bin", ".idx"):
        paths = [Path(f"{report.prefixes[0]}{suffix}") for report in (alone, together)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_report_tells_what_training_must_know(corpus: Path, tokenizer: Tokenizer) -> None:
    run = preprocess(options(corpus, tokenizer))
    report = read_report(run.prefixes[0])
    assert report == run.datasets[0]
    assert report is not None
    assert report.tokenizer.fingerprint == tokenizer.fingerprint
    assert (report.tokenizer.vocab_size, report.tokenizer.eod_id) == (500, tokenizer.eod_id)
    assert (report.documents, report.dtype, report.append_eod) == (len(TEXTS), "uint16", True)
    assert report.inputs == {str(corpus): corpus.stat().st_size}
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    tokens = TokenReader(run.prefixes[0]).tokens
    assert report.tokens == tokens.size
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    assert report.unigram_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_the_entropy_of_even_frequencies_is_the_logarithm_of_their_number() -> None:
    assert entropy_nats(np.array([7, 0, 7, 7, 7])) == pytest.approx(math.log(4))
    assert entropy_nats(np.zeros(5, np.int64)) == 0.0


def test_without_append_eod_no_end_token_is_written(corpus: Path, tokenizer: Tokenizer) -> None:
    report = preprocess(options(corpus, tokenizer, append_eod=False))
    assert tokenizer.eod_id not in TokenReader(report.prefixes[0]).tokens


def test_literal_end_tokens_are_counted_and_read_as_asked(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "a<|endoftext|>b"}\n{"text": "c"}\n')
    for literal, ends in (("eod", 3), ("text", 2)):
        report = preprocess(options(corpus, tokenizer, literal_eod=literal))
        tokens = TokenReader(report.prefixes[0]).tokens
        assert (tokens == tokenizer.eod_id).sum() == ends
        assert report.datasets[0].documents_with_literal_eod == 1


def test_each_key_gets_its_own_data_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "one", "doc": "two three"}\n')
    report = preprocess(options(corpus, tokenizer, json_keys=("text", "doc")))
    texts = [tokenizer.decode(TokenReader(prefix).document(0)) for prefix in report.prefixes]
    assert texts == ["one<|endoftext|>", "two three<|endoftext|>"]
    assert [prefix.name for prefix in report.prefixes] == ["x_text_document", "x_doc_document"]


def test_the_data_sets_of_several_keys_appear_together_or_not_at_all(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "one", "doc": "two three"}\n')
    written: list[object] = []

    def full_disk(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        indexed.write_index(*arguments)

    monkeypatch.setattr("phi1_megatron.data.assembly.write_index", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        preprocess(options(corpus, tokenizer, json_keys=("text", "doc")))
    assert list(files(tmp_path / "out")) == ["x.parts"]
    monkeypatch.undo()
    preprocess(options(corpus, tokenizer, json_keys=("text", "doc")))
    assert len(list((tmp_path / "out").glob("*.idx"))) == 2


def test_bad_rows_are_set_aside_and_reported(corpus: Path, tokenizer: Tokenizer) -> None:
    with corpus.open("a") as file:
        file.write('{"text": ""}\nnonsense\n')
    report = preprocess(options(corpus, tokenizer))
    assert report.datasets[0].documents == len(TEXTS)
    assert report.datasets[0].bad_rows == {"broken JSON": 1, "empty text": 1}
    assert report.quarantine is not None
    quarantined = [json.loads(line) for line in report.quarantine.read_text().splitlines()]
    assert [row["line"] for row in quarantined] == [len(TEXTS) + 1, len(TEXTS) + 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_stops_and_leaves_an_earlier_result_untouched(
    corpus: Path, tokenizer: Tokenizer, workers: int
) -> None:
    preprocess(options(corpus, tokenizer))
    before = files(corpus.parent / "out")
    with corpus.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(DataError, match="line 301: broken JSON"):
        preprocess(options(corpus, tokenizer, strict=True, workers=workers, shard_bytes=2000))
    after = files(corpus.parent / "out")
    assert after.pop("x.parts") == b""  # what was finished before the bad row
    assert after == before


def test_an_input_without_a_usable_document_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"content": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r"no usable document \(2 missing key\)"):
        preprocess(options(corpus, tokenizer))
    assert files(tmp_path / "out") == {}


def test_a_killed_worker_ends_the_run_at_once_and_is_named(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    def kill_one(done: int, *progress: int) -> None:
        if not done:
            return
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(DataError, match=r"worker \d of 2 \(process \d+\) was killed by signal 9"):
        preprocess(options(corpus, tokenizer, workers=2, shard_bytes=1000), kill_one)
    assert time.monotonic() - started < 20
    assert list(files(corpus.parent / "out")) == ["x.parts"]  # to go on from
    assert multiprocessing.active_children() == []


def test_progress_reaches_the_end_with_the_totals(corpus: Path, tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, ...]] = []
    report = preprocess(
        options(corpus, tokenizer, shard_bytes=2000), lambda *progress: seen.append(progress)
    )
    size = corpus.stat().st_size
    assert seen[-1] == (size, size, len(TEXTS), report.datasets[0].tokens)
    assert all(np.diff(np.array(seen), axis=0).min(axis=0) >= 0)
    assert len(seen) > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_before_anything_is_done_leaves_nothing(
    corpus: Path, tokenizer: Tokenizer, workers: int
) -> None:
    def interrupt(*progress: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(options(corpus, tokenizer, workers=workers, shard_bytes=1000), interrupt)
    assert files(corpus.parent / "out") == {}
    assert multiprocessing.active_children() == []


def test_options_that_make_no_sense_are_refused(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="0 workers"):
        options(corpus, tokenizer, workers=0)
    with pytest.raises(UsageError, match="all different"):
        options(corpus, tokenizer, json_keys=("text", "text"))


def test_an_output_that_cannot_be_written_is_one_sentence(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    (corpus.parent / "out").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"x\.parts could not be made"):
        preprocess(options(corpus, tokenizer))


def run_tool(repository: Path, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    tool = repository / "tools" / "preprocess" / "preprocess_data.py"
    command = [sys.executable, str(tool), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


def test_the_script_takes_megatron_lm_flags_and_says_what_it_made(
    repository: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tokenizer.save(tmp_path / "tokenizer")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    done = run_tool(
        repository, "--input", corpus, corpus, "--output-prefix", "data/x", "--json-keys", "text",
        *flags, "--append-eod", "--workers", 1, "--partitions", 1, "--log-interval", 100,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 (" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert len(TokenReader(tmp_path / "data" / "x_text_document")) == 600
    assert "documents" in done.stderr  # plain progress lines: this is no terminal


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--input", "absent.jsonl"], 1, "input not found: no file, folder or pattern absent"),
        (["--inptu", "a"], 2, "--inptu"),
        (["--input", "a", "--workers", "0"], 2, "0 workers"),
    ],
)
def test_the_script_fails_in_a_sentence_and_with_its_code(
    repository: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    folder = tokenizer.save(tmp_path / "tokenizer")
    done = run_tool(
        repository, *flags, "--output-prefix", "x", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", folder, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_preprocessing_loads_no_torch_transformers_or_megatron(
    repository: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tokenizer.save(tmp_path / "tokenizer")
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from phi1_megatron.data.preprocess import PreprocessOptions, preprocess\n"
        "from phi1_megatron.data.definition import load_definition\n"
        f"preprocess(PreprocessOptions(({str(corpus)!r},), Path({str(tmp_path / 'x')!r}), "
        f"load_definition({str(folder)!r}), True, workers=1))\n"
        "print({'torch', 'transformers', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=repository
    )
    assert done.stdout.strip() == "set()"
