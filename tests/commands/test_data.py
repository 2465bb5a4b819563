"""What ``phi1 data`` shows and says: inspect, verify, prepare."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi1_megatron.commands import data as data_commands
from phi1_megatron.config.load import load_recipe, to_toml
from phi1_megatron.data.indexed import IndexedDatasetWriter
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from phi1_megatron.data.report import read_report, write_report
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe
from phi1_megatron.distributed.launch import Place
from phi1_megatron.errors import DataError, UsageError
from phi1_megatron.training.trainer import train
from tests.distributed_harness import run_ranks, tiny_config
from tests.training.toy_data import write_toy_data

TEXTS = [f"def f{n}(x):\n\treturn [{n}]  # 世 [bold]{'y' * 90}[/]\n" * (n + 1) for n in range(9)]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # It has not met the Chinese character, which so takes three tokens.
    return train_bpe([text.replace("世", "") for text in TEXTS], 340)


@pytest.fixture(autouse=True)
def _a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prefix(tokenizer: Tokenizer) -> Path:
    corpus = Path("corpus.jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = PreprocessOptions((str(corpus),), Path("duck"), tokenizer.definition, True, workers=1)
    return preprocess(options).prefixes[0]


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def shown_documents(shown: str) -> list[int]:
    return [int(number) for number in re.findall(r"^document (\d+) of", shown, re.MULTILINE)]


def test_inspect_shows_every_token_within_80_columns(
    prefix: Path, tokenizer: Tokenizer, capsys: Captured
) -> None:
    data_commands.inspect(prefix, tokenizer=tokenizer.save(Path("tokens")))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown_documents(shown) == [0, 4, 8]
    first = shown.split("document 0 of 9")[1].split("document 4")[0]
    lines = [line.strip() for line in first.splitlines()[1:]]
    assert "".join(lines).replace("│", "") == (
        TEXTS[0].replace("\n", "⏎").replace("\t", "→").replace("世", "世⟨3 tokens⟩")
        + "<|endoftext|>"
    )
    assert "".join(lines).count("│") == len(tokenizer.encode(TEXTS[0])) + 1 - 2
    assert any(line.endswith("⏎│") for line in lines)


def test_inspect_of_one_document_shows_all_of_it_and_nothing_else(
    prefix: Path, tokenizer: Tokenizer, capsys: Captured
) -> None:
    data_commands.inspect(prefix, document=8)
    shown = capsys.readouterr().out
    assert shown_documents(shown) == [8]
    ids = [int(word) for word in shown.split("tokens\n")[1].split()]
    assert ids == [*tokenizer.encode(TEXTS[8]), tokenizer.eod_id]
    assert "tokens in a document" not in shown


def test_inspect_counts_documents_by_length(prefix: Path, capsys: Captured) -> None:
    data_commands.inspect(prefix, samples=0)
    shown = capsys.readouterr().out
    counts = re.findall(r"^ +[\d,]+ to +[\d,]+ +(\d+)", shown, re.MULTILINE)
    assert sum(map(int, counts)) == len(TEXTS)
    assert re.search(r"shortest +10% +median +90% +99% +longest +mean\n", shown)


def test_inspect_shows_what_another_tool_wrote_and_in_how_many_sequences(capsys: Captured) -> None:
    with IndexedDatasetWriter("foreign", np.int32) as writer:
        writer.add_document([1, 2, 3], [2, 1])
        writer.add_document([])
    data_commands.inspect(Path("foreign"))
    shown = capsys.readouterr().out
    assert "none: another tool made this data set" in shown
    assert "document 0 of 2: 3 tokens in 2 sequences\n  1 2 3\n" in shown
    assert "document 1 of 2: 0 tokens in 0 sequences\n" in shown


def test_inspect_of_a_data_set_without_documents_says_so(capsys: Captured) -> None:
    with IndexedDatasetWriter("empty", np.uint16):
        pass
    data_commands.inspect(Path("empty"))
    assert "documents  0\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has no document 0: it holds 0"):
        data_commands.inspect(Path("empty"), document=0)


def test_inspect_refuses_another_tokenizer_by_name_and_fingerprint(
    prefix: Path, tokenizer: Tokenizer, capsys: Captured
) -> None:
    other = train_bpe(TEXTS, 310)
    folder = other.save(Path("other"))
    with pytest.raises(DataError, match="would show other text; give the one") as raised:
        data_commands.inspect(prefix, tokenizer=folder)
    assert tokenizer.fingerprint[:12] in str(raised.value)
    assert other.fingerprint[:12] in str(raised.value)
    assert capsys.readouterr().out == ""


def test_verify_says_which_checksums_agree(prefix: Path, capsys: Captured) -> None:
    report = read_report(prefix)
    assert report is not None
    assert report.chunks
    data_commands.verify(prefix)
    count = len(report.chunks)
    message = f"all checksums agree: of {count} chunks of the .bin and of the .idx"
    assert message in capsys.readouterr().out
    write_report(prefix, replace(report, chunks=(), idx_xxh3_128=None))
    data_commands.verify(prefix)
    assert "no checksums of the .bin: an older version" in capsys.readouterr().out
    Path(f"{prefix}.report.json").unlink()
    data_commands.verify(prefix)
    assert "no checksums: another tool made this data set" in capsys.readouterr().out


def test_verify_finds_a_wrong_byte_in_what_preprocess_wrote(prefix: Path) -> None:
    data = Path(f"{prefix}.bin")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(DataError, match=r"duck_text_document\.bin: chunk \d+ of \d+, bytes"):
        data_commands.verify(prefix)


def recipe(**training: Any) -> Path:
    """Two data sets for training, the same for validation, in a recipe beside them."""
    blend = [
        {"prefix": write_toy_data(Path("a")), "weight": 3.0},
        {"prefix": write_toy_data(Path("b"), documents=40, seed=6)},
    ]
    settings = {"train_steps": 3, "eval_interval": 3, "eval_steps": 1, **training}
    Path("toy.toml").write_text(to_toml(tiny_config(data={"blend": blend}, training=settings)))
    return Path("toy.toml")


def test_prepare_tells_what_it_built_and_then_that_nothing_was_left(capsys: Captured) -> None:
    data_commands.prepare(recipe())
    shown = capsys.readouterr().out
    assert "Sample indices in runs/toy/index-cache\n" in shown
    heads = re.findall(r"^(?:training|validation) \S+$", shown, re.MULTILINE)
    assert heads == ["training a", "training b", "validation a", "validation b"]
    assert shown.count("built, ") == 4
    assert "4 built: a run of this recipe finds them all." in shown
    # 3 steps of 8 samples, three quarters of them from a; one validation of 8.
    assert re.findall(r"takes ([\d.]+) = ", shown) == ["18", "6", "6", "2"]
    before = files_of(Path("runs/toy/index-cache"))
    data_commands.prepare(recipe())
    shown = capsys.readouterr().out
    assert shown.count("was there, ") == 4
    assert "Nothing was left to do" in shown
    assert files_of(Path("runs/toy/index-cache")) == before


def test_prepare_takes_overrides_and_a_run_folder_as_train_does(capsys: Captured) -> None:
    data_commands.prepare(recipe(), "training.eval_interval=0", run_dir=Path("elsewhere"))
    assert "2 built" in capsys.readouterr().out
    assert len(list(Path("elsewhere/index-cache").iterdir())) == 8
    data_commands.prepare(recipe(), 'data.index_cache="shared"', "data.seq_length=16")
    assert len(list(Path("shared").iterdir())) == 16


def test_prepare_refuses_what_training_would_refuse(capsys: Captured) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx does not exist"):
        data_commands.prepare(recipe(), 'data.blend=["nowhere"]')
    assert capsys.readouterr().out == ""


@pytest.mark.distributed
def test_a_run_builds_nothing_of_what_was_prepared(tmp_path: Path) -> None:
    data_commands.prepare(recipe())
    cache = tmp_path / "runs/toy/index-cache"
    before = files_of(cache)
    config = load_recipe(Path("toy.toml"))
    run_ranks(1, train_in, tmp_path, config)
    assert (tmp_path / "runs/toy/metrics.jsonl").read_text().count("\n") == 3
    assert files_of(cache) == before


def train_in(place: Place, folder: Path, config: Any) -> None:
    # Paths are part of the cache's names: the run must see the data sets under the same ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(config, Path("runs/toy"), None)
