"""Training SentencePiece models: whole texts come back, the same corpus gives the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phi1_megatron.data.definition import WHITESPACE_RUNS, TokenizerDefinition
from phi1_megatron.data.sentencepiece_model import SentencePieceEngine
from phi1_megatron.data.sentencepiece_training import train_sentencepiece
from phi1_megatron.errors import DataError, UsageError

TEXTS = [
    "def fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1)\n",
    "class Duck:\n\t\tdef quack(self):\n\t\t\treturn 'quack' * 3\n",
    "for i in range(10):\n    print(i, end=' ')  # ▁ and ▅ and <|endoftext|>\n",
] * 20

any_text = st.lists(
    st.sampled_from(["▁", "▁▁▁", "▅", "<|endoftext|>", "\r", "\0", "def", "\ufffd", "⁇", "<0x0A>"])
    | st.characters(exclude_categories=["Cs"])
    | st.sampled_from([" ", "\t", "\n"]).flatmap(lambda c: st.integers(1, 70).map(lambda n: c * n))
).map("".join)


@pytest.fixture(scope="module")
def trained() -> TokenizerDefinition:
    return train_sentencepiece(TEXTS, 350)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def engine(request: pytest.FixtureRequest) -> SentencePieceEngine:
    return SentencePieceEngine(train_sentencepiece(TEXTS, 350, request.param))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=any_text)
@example(text=" \t\r\n\0▁ <|endoftext|>  ")
def test_any_text_comes_back_whole(text: str, engine: SentencePieceEngine) -> None:
    ids = engine.encode([text]).ids
    assert engine.decode(ids) == text
    assert 0 not in ids  # <unk>


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=any_text)
def test_the_library_by_itself_gives_the_same_ids_and_the_text(
    text: str, trained: TokenizerDefinition
) -> None:
    text = text.replace("<|endoftext|>", "")  # which it takes for text
    stock = sentencepiece.SentencePieceProcessor(model_proto=trained.content)
    ids = stock.encode(text)
    assert ids == SentencePieceEngine(trained).encode([text]).ids.tolist()
    assert stock.decode(ids) == text


def test_the_vocabulary_begins_with_the_special_tokens_the_runs_and_the_bytes(
    trained: TokenizerDefinition,
) -> None:
    stock = sentencepiece.SentencePieceProcessor(model_proto=trained.content)
    assert (trained.vocab_size, trained.eod_id, stock.eos_id()) == (350, 1, 1)
    assert trained.eod_token == "<|endoftext|>"
    assert [stock.id_to_piece(i) for i in range(2, 40)] == list(WHITESPACE_RUNS)
    assert [stock.encode(run) for run in WHITESPACE_RUNS] == [[i] for i in range(2, 40)]
    assert [stock.id_to_piece(i) for i in (40, 295)] == ["<0x00>", "<0xFF>"]


def test_nothing_is_learned_of_spaces_marks_digits_and_the_end_token(
    trained: TokenizerDefinition,
) -> None:
    stock = sentencepiece.SentencePieceProcessor(model_proto=trained.content)
    learned = [stock.id_to_piece(i) for i in range(296, 350)]
    assert not [p for p in learned if "▁" in p or "▅" in p or "|" in p or "  " in p]
    assert not [p for p in learned if len(p) > 1 and any(c.isdigit() for c in p)]
    assert [p for p in learned if p.endswith(":\n") or p.startswith(" ")]


def test_the_learned_pieces_are_those_of_a_plain_sentencepiece_run(
    trained: TokenizerDefinition, tmp_path: Path
) -> None:
    """The same vocabulary as the command line's, apart from how spaces are written."""
    corpus = tmp_path / "corpus.txt"
    lines = "".join(TEXTS[:2] * 20)
    corpus.write_text(lines)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=345, model_type="bpe",
        unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|endoftext|>", minloglevel=2,
        user_defined_symbols=[run.replace(" ", "▁") for run in WHITESPACE_RUNS],
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(lines.splitlines(), 345).content
    )
    pieces = [reference.id_to_piece(i).replace("▁", " ") for i in range(345)]
    assert [ours.id_to_piece(i) for i in range(345)] == pieces


def test_training_twice_in_different_processes_gives_the_same_model(
    trained: TokenizerDefinition, repository: Path
) -> None:
    script = (
        "import json, sys\n"
        "from phi1_megatron.data.sentencepiece_training import train_sentencepiece\n"
        "print(train_sentencepiece(json.load(sys.stdin), 350).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
        cwd=repository,
    )
    assert done.stdout.strip() == trained.fingerprint


def test_training_reads_its_texts_once_reports_progress_and_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stream() -> Iterator[str]:
        yield from TEXTS

    seen: list[tuple[int, int]] = []
    train_sentencepiece(stream(), 350, on_progress=lambda *progress: seen.append(progress))
    assert seen[-1] == (sum(map(len, TEXTS)), len(TEXTS))
    assert capfd.readouterr() == ("", "")


def test_a_long_document_is_learned_from_to_its_end() -> None:
    text = "x = 1\n" * 5000 + " quack" * 2000 + "\nwoof" * 5000
    definition = train_sentencepiece([text], 330)
    stock = sentencepiece.SentencePieceProcessor(model_proto=definition.content)
    assert len(stock.encode(" quack")) == 1
    assert len(stock.encode("woof")) == 1


def test_a_corpus_beyond_the_sample_is_sampled_evenly() -> None:
    texts = [f"{word} " * 400 for word in ("alpha", "beta", "gamma", "delta") for _ in range(8)]
    definition = train_sentencepiece(texts, 360, sample_characters=sum(map(len, texts)) // 4)
    stock = sentencepiece.SentencePieceProcessor(model_proto=definition.content)
    assert [len(stock.encode(f" {word}")) for word in ("alpha", "beta", "gamma", "delta")] == [
        1
    ] * 4
    first = train_sentencepiece(texts, 360, sample_characters=2000)  # one text holds that much
    stock = sentencepiece.SentencePieceProcessor(model_proto=first.content)
    assert len(stock.encode(" delta")) > 1


def test_a_small_corpus_gives_a_smaller_vocabulary_than_asked_for() -> None:
    definition = train_sentencepiece(["ab ab ab"], 5000)
    assert definition.vocab_size == 296 + len(["a", "b", " ", "ab", " a", " ab"])


def test_training_refuses_a_vocabulary_without_room_for_the_characters() -> None:
    with pytest.raises(UsageError, match=r"of 200 cannot be trained: .* already need 298\."):
        train_sentencepiece(["ab"], 200)
    chinese = ["".join(map(chr, range(0x4E00, 0x4F00)))]
    with pytest.raises(UsageError, match="already need 552"):
        train_sentencepiece(chinese, 400)


@pytest.mark.parametrize("texts", [[], [""], [" \n"]])
def test_training_without_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds no text"):
        train_sentencepiece(texts, 400)
