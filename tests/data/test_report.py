"""Reports of data sets, and the commands that read, check and join them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi1_megatron.commands import data as data_commands
from phi1_megatron.commands import tokenizer as tokenizer_commands
from phi1_megatron.data.indexed import IndexedDatasetWriter, TokenReader
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from phi1_megatron.data.report import read_report, report_path
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe
from phi1_megatron.errors import DataError

TEXTS = [f"x{n} = [{n}] * {n}\n    # [bold]duck[/]\n" for n in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 320)


def dataset(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> Path:
    corpus = folder / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PreprocessOptions(
        (str(corpus),), folder / name, tokenizer.definition, True, workers=1
    )
    return preprocess(options).prefixes[0]


def test_a_merged_data_set_has_the_report_of_one_made_at_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi1_megatron.data.report._CHUNK", 7)
    parts = [
        dataset(tmp_path, "a", TEXTS[:20], tokenizer),
        dataset(tmp_path, "b", TEXTS[20:], tokenizer),
    ]
    data_commands.merge(parts, output_prefix=tmp_path / "merged")
    merged, whole = (
        read_report(tmp_path / "merged"),
        read_report(dataset(tmp_path, "whole", TEXTS, tokenizer)),
    )
    assert merged is not None
    assert whole is not None
    for name in ("documents", "tokens", "text_bytes", "unigram_entropy_nats", "tokenizer", "dtype"):
        assert getattr(merged, name) == getattr(whole, name), name


def test_data_sets_of_different_tokenizers_are_not_merged(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    parts = [
        dataset(tmp_path, "a", TEXTS, tokenizer),
        dataset(tmp_path, "b", TEXTS, train_bpe(TEXTS, 310)),
    ]
    with pytest.raises(DataError, match="their ids mean different things"):
        data_commands.merge(parts, output_prefix=tmp_path / "merged")
    assert not (tmp_path / "merged.bin").exists()


def test_merging_what_another_tool_wrote_leaves_no_stale_report(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with IndexedDatasetWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add_document([1, 2, 3])
    report_path(tmp_path / "merged").write_text("of an earlier data set")
    data_commands.merge([tmp_path / "foreign"], output_prefix=tmp_path / "merged")
    assert read_report(tmp_path / "merged") is None


def test_verify_refuses_a_report_that_speaks_of_other_tokens(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = dataset(tmp_path, "a", TEXTS, tokenizer)
    data_commands.verify(prefix)
    assert "ids below 320" in capsys.readouterr().out
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
    with pytest.raises(DataError, match="holds 1 documents and 3 tokens, but its report"):
        data_commands.verify(prefix)


def test_a_report_of_another_make_is_named(tmp_path: Path) -> None:
    report_path(tmp_path / "a").write_text('{"prefix": 3}')
    with pytest.raises(DataError, match=r"a\.report\.json is not a report"):
        read_report(tmp_path / "a")


def test_inspect_shows_counts_and_text_within_80_columns(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    prefix = dataset(Path(), "a", TEXTS, tokenizer)
    data_commands.inspect(prefix, tokenizer=tokenizer.save(Path("duck")), samples=1)
    shown = capsys.readouterr().out
    assert f"{TokenReader(prefix).index.num_tokens:,} as uint16" in shown
    assert "[" in shown.split("document 0")[1]  # brackets of the text are no markup
    assert max(map(len, shown.splitlines())) <= 80


def test_tokenizer_train_writes_a_folder_and_says_when_merges_ran_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "ab ab ab"}\nbroken\n')
    tokenizer_commands.train([str(corpus)], output=tmp_path / "duck", vocab_size=5000)
    shown = capsys.readouterr().out
    size = Tokenizer.load(tmp_path / "duck").vocab_size
    assert f"merges for {size} ids only" in shown
    assert "1 broken JSON" in shown
