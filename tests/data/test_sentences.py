"""Sentences against NLTK's own Punkt, and code that must stay whole."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import msgspec
import nltk.data
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nltk.tokenize.punkt import (
    PunktLanguageVars,
    PunktParameters,
    PunktSentenceTokenizer,
    PunktTrainer,
)

from phi1_megatron.data import sentences
from phi1_megatron.data.sentences import SentenceSplitter, installed_punkt, train_punkt
from phi1_megatron.errors import DataError, UsageError

PROSE = [
    "Dr. Smith went to Washington. He met Mr. Jones there. Mr. Jones had a duck.",
    "The duck, i.e. the bird, said no. Then Dr. Smith left. Why? Nobody knows!",
    "See fig. 3 for the data. It was 5 p.m. when J. Doe came. J. Doe stayed.",
] * 30

WORDS = """Dr. Mr. fig. e.g. duck Duck. said he He 3. J. (yes.) no! why? "So." well... it, U.S. it's
and; end: \u2019quoted.\u2019 «Oui.» -- a.b x!y The"""
word = st.sampled_from(WORDS.split())
prose = st.lists(st.tuples(word, st.sampled_from([" ", "  ", "\n", "\n\n"]))).map(
    lambda pairs: "".join(w + space for w, space in pairs)
)
mixed = st.lists(
    st.tuples(
        word
        | st.sampled_from(
            ["```", "~~~", ">>> x. Y", "    a. B", "\tc. D", "so::", "x = f(1)", "}"]
        ),
        st.sampled_from([" ", "\n", "\n\n", "\r\n", "\n    ", "\u2028"]),
    )
).map(lambda pairs: "".join(w + space for w, space in pairs))


@pytest.fixture(scope="module")
def params() -> bytes:
    return train_punkt(PROSE)


def parameters(params: bytes) -> PunktParameters:
    """NLTK's own object of what we serialized."""
    known = json.loads(params)
    theirs = PunktParameters()
    theirs.abbrev_types = set(known["abbrev_types"])
    theirs.collocations = {tuple(pair) for pair in known["collocations"]}
    theirs.sent_starters = set(known["sent_starters"])
    theirs.ortho_context.update(known["ortho_context"])
    return theirs


class KeepingNewlines(PunktLanguageVars):
    """The recipe that Megatron-LM's preprocessing uses: \\s* where NLTK has \\s+."""

    _period_context_fmt = r"\S*" + PunktLanguageVars._period_context_fmt.replace(
        r"(?=(?P<after_tok>", r"\s*(?=(?P<after_tok>"
    ).replace(r"\s+(?P<next_tok>", r"(?P<next_tok>")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=prose)
@example(text="Dr. Smith came.\n\nHe left. 'So.' (Yes.) Well... no.\n")
@pytest.mark.parametrize("whole_code", [False, True])
@pytest.mark.parametrize("keep_newlines", [False, True])
def test_prose_is_split_as_nltk_splits_it(
    text: str, params: bytes, keep_newlines: bool, whole_code: bool
) -> None:
    variables = KeepingNewlines() if keep_newlines else PunktLanguageVars()
    theirs = PunktSentenceTokenizer(parameters(params), lang_vars=variables)
    assert SentenceSplitter(params, keep_newlines, whole_code).split(text) == theirs.tokenize(text)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=mixed)
@pytest.mark.parametrize("keep_newlines", [False, True])
def test_only_whitespace_is_lost(text: str, params: bytes, keep_newlines: bool) -> None:
    found = SentenceSplitter(params, keep_newlines, whole_code=True).split(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence.strip() for sentence in found)


def test_newlines_are_kept_after_the_sentences_they_follow(params: bytes) -> None:
    text = "One duck.\n\nTwo ducks.\n"
    assert SentenceSplitter(params, False, True).split(text) == ["One duck.", "Two ducks."]
    assert SentenceSplitter(params, True, True).split(text) == ["One duck.\n\n", "Two ducks."]


PAGE = (
    "First. Then:\n\n```\na. B\n\nc! D\n```\n\n"
    "Now this. And:\n\n    e. F\n\n    g? H\n\nAlso::\n\n  i. J\n\n>>> k. L\nM. N\n\nDone. Well.\n"
)
CODE = ["```\na. B\n\nc! D\n```", "    e. F\n\n    g? H", "  i. J", ">>> k. L\nM. N"]


def test_blocks_of_code_stay_whole_and_the_prose_between_is_split(params: bytes) -> None:
    found = SentenceSplitter(params, False, True).split(PAGE)
    assert found == [
        "First.", "Then:", CODE[0], "Now this.", "And:", CODE[1], "Also::", CODE[2], CODE[3],
        "Done.", "Well.",
    ]  # fmt: skip
    kept = SentenceSplitter(params, True, True).split(PAGE)
    assert [sentence.strip("\n").rstrip() for sentence in kept] == found
    assert "".join(kept).replace(" ", "") == PAGE.rstrip().replace(" ", "")


def test_without_whole_code_punkt_splits_everything(params: bytes) -> None:
    reference = PunktSentenceTokenizer(parameters(params))
    assert SentenceSplitter(params, False, False).split(PAGE) == reference.tokenize(PAGE)


def test_source_code_is_one_sentence(params: bytes) -> None:
    source = '\ndef f(x):\n    """Adds. Then returns."""\n\n    return x + 1.  \n'
    for keep_newlines in (False, True):
        assert SentenceSplitter(params, keep_newlines, True).split(source) == [source.rstrip()]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t\n"])
def test_a_text_without_words_has_no_sentences(params: bytes, text: str) -> None:
    for keep_newlines in (False, True):
        assert SentenceSplitter(params, keep_newlines, True).split(text) == []


def test_a_long_text_is_split_in_pieces_of_a_million_characters(
    params: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sentences._PIECE_CHARACTERS == 1_000_000
    monkeypatch.setattr(sentences, "_PIECE_CHARACTERS", 10)
    text = "One two three. Four five."
    theirs = PunktSentenceTokenizer(parameters(params))
    expected = [s for i in range(0, len(text), 10) for s in theirs.tokenize(text[i : i + 10])]
    assert SentenceSplitter(params, False, True).split(text) == expected


def test_a_splitter_travels_with_its_parameters_alone(params: bytes) -> None:
    splitter = SentenceSplitter(params, True, True)
    before = len(pickle.dumps(splitter))
    split = splitter.split(PAGE)
    assert len(pickle.dumps(splitter)) == before < len(params) + 500
    assert pickle.loads(pickle.dumps(splitter)).split(PAGE) == split
    prints = {SentenceSplitter(p, k, w).fingerprint for p in (params, b"{}") for k, w in FLAGS}
    assert len(prints) == 8
    assert SentenceSplitter(params, True, True).fingerprint == splitter.fingerprint


FLAGS = [(False, False), (False, True), (True, False), (True, True)]


def test_words_that_were_never_seen_are_not_remembered(params: bytes) -> None:
    splitter = SentenceSplitter(params, False, False)
    splitter.split("Dr. Zyx left. Then Dr. Qwv came.")
    assert len(splitter._punkt._params.ortho_context) == len(json.loads(params)["ortho_context"])


def test_a_text_of_many_short_sentences_meets_no_time_limit(
    params: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nltk.redos.DEFAULT_TIMEOUT", 0.05)
    text = "A b. " * 20_000
    with pytest.raises(TimeoutError):
        PunktSentenceTokenizer(parameters(params)).tokenize(text)
    for keep_newlines in (False, True):
        assert len(SentenceSplitter(params, keep_newlines, False).split(text)) == 20_000


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_long_words_take_linear_time(params: bytes, keep_newlines: bool) -> None:
    splitter = SentenceSplitter(params, keep_newlines, True)
    for text in ("a" * 400_000 + ". B", "a.b" * 150_000 + ". B", "." * 400_000, "!x" * 100_000):
        assert "".join(splitter.split(text)).replace(" ", "") == text.replace(" ", "")


def test_training_gives_what_nltk_s_trainer_gives(params: bytes) -> None:
    trainer = PunktTrainer("\n\n".join(PROSE))
    theirs, ours = trainer.get_params(), parameters(params)
    assert ours.abbrev_types == theirs.abbrev_types
    assert "mr" in ours.abbrev_types
    assert ours.collocations == theirs.collocations
    assert ours.sent_starters == theirs.sent_starters
    assert dict(ours.ortho_context) == {w: n for w, n in theirs.ortho_context.items() if n}


def test_training_passes_over_code(params: bytes) -> None:
    code = "def f(x):\n    return np. X\n" * 50
    assert train_punkt([*PROSE, code]) == params
    assert train_punkt([code, *PROSE]) == params


def test_training_stops_after_its_share_and_batches_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sentences, "_TRAINING_CHARACTERS", 2000)
    monkeypatch.setattr(sentences, "_TRAINING_BATCH", 500)
    read = 0

    def corpus():
        nonlocal read
        while True:
            read += len(PROSE[0])
            yield PROSE[read % 3]

    assert train_punkt(corpus())
    assert 2000 <= read < 3000
    monkeypatch.setattr(sentences, "_READ_AT_MOST", 5000)
    train_punkt("x = f(1)\n" * 10 for _ in iter(int, 1))  # endless, and no prose


def test_training_in_another_process_gives_the_same_bytes(params: bytes, repository: Path) -> None:
    script = (
        "import json, sys\nfrom phi1_megatron.data.sentences import train_punkt\n"
        "sys.stdout.buffer.write(train_punkt(json.load(sys.stdin)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(PROSE).encode(),
        capture_output=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
        cwd=repository,
    )
    assert done.stdout == params


def test_training_without_text_is_refused() -> None:
    with pytest.raises(DataError, match="holds no text"):
        train_punkt(["", ""])


def test_parameters_installed_with_nltk_s_data_are_found(
    params: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert installed_punkt("english") is None
    known = json.loads(params)
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    tables = {
        "abbrev_types.txt": known["abbrev_types"],
        "sent_starters.txt": known["sent_starters"],
        "collocations.tab": ["\t".join(pair) for pair in known["collocations"]],
        "ortho_context.tab": [f"{w}\t{n}" for w, n in known["ortho_context"].items()],
    }
    for name, rows in tables.items():
        (folder / name).write_text("\n".join(rows), encoding="utf-8")
    assert installed_punkt("english") == params
    assert installed_punkt("german") is None


def test_the_older_pickled_parameters_are_found(
    params: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    folder = tmp_path / "tokenizers" / "punkt"
    folder.mkdir(parents=True)
    with (folder / "english.pickle").open("wb") as stream:
        pickle.dump(PunktSentenceTokenizer(parameters(params)), stream)
    assert installed_punkt("english") == params


def test_a_name_that_is_no_language_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'\.\./english' is not the name of a Punkt model"):
        installed_punkt("../english")


def test_without_nltk_the_error_says_what_to_do(
    params: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize.punkt", None)
    for use in (
        lambda: installed_punkt("english"),
        lambda: train_punkt(PROSE),
        lambda: SentenceSplitter(params, False, False).split("A. B."),
    ):
        with pytest.raises(DataError, match="NLTK, which splits sentences, is not installed; pip"):
            use()


def test_parameters_are_plain_json(params: bytes) -> None:
    assert msgspec.json.decode(params).keys() == {
        "abbrev_types", "collocations", "sent_starters", "ortho_context",
    }  # fmt: skip
