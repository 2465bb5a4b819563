"""``phi1 tokenizer train``: what it writes, and what it says in 80 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from phi1_megatron.cli import build_app, run_app
from phi1_megatron.data.definition import load_definition
from phi1_megatron.data.sentencepiece_model import sentencepiece_definition
from phi1_megatron.data.tokenizer import Tokenizer

TEXTS = [f"def f{n}(x):\n    return x * {n}  # quack\n" for n in range(100)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "broken\n")
    return path


def train(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_app(build_app(), ["tokenizer", "train", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_training_writes_a_folder_that_ours_and_transformers_open(
    corpus: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", "duck", "--vocab-size", "340", "--type", kind]
    assert train(str(corpus), *flags) == 0
    tokenizer = Tokenizer.load("duck")
    assert tokenizer.vocab_size == load_definition("duck").vocab_size == 340
    ids = tokenizer.encode(TEXTS[7])
    assert tokenizer.decode(ids) == TEXTS[7]
    assert len(ids) < len(TEXTS[7]) / 1.5
    assert AutoTokenizer.from_pretrained("duck")(TEXTS[7])["input_ids"] == ids
    assert Path("duck/tokenizer.model").is_file() == (kind == "sentencepiece")
    if kind == "sentencepiece":
        model = Tokenizer(sentencepiece_definition("duck"))
        assert model.encode(TEXTS[7]) == ids
        assert model.eod_id == tokenizer.eod_id
    shown = capsys.readouterr().out
    assert "vocabulary 340" in shown
    assert f"end id     {tokenizer.eod_id} <|endoftext|>" in shown
    assert "1 broken JSON" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_byte_level_bpe_is_what_is_trained_by_default(corpus: Path) -> None:
    assert train(str(corpus), "--output", "duck", "--vocab-size", "320") == 0
    assert json.loads(Path("duck/tokenizer.json").read_text())["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_corpus_too_small_for_the_vocabulary_is_told(
    corpus: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", "duck", "--vocab-size", "9000", "--type", kind]
    assert train(str(corpus), *flags) == 0
    shown = capsys.readouterr().out
    assert f"merges for {Tokenizer.load('duck').vocab_size} ids only, not for 9,000" in (
        " ".join(shown.split())
    )
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("kind", "needs"), [("bpe", "295"), ("sentencepiece", "3")])
def test_a_vocabulary_without_room_is_refused_in_one_sentence(
    corpus: Path, kind: str, needs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", "duck", "--vocab-size", "200", "--type", kind]
    assert train(str(corpus), *flags) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"already need {needs}" in told
    assert "Traceback" not in told
    assert not Path("duck").exists()
