"""Tokenizers against Hugging Face's: the same ids, in a folder that both open."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi1_megatron.data.definition import codegen_definition, load_definition
from phi1_megatron.data.sentencepiece_model import as_tokenizer_json
from phi1_megatron.data.sentencepiece_training import train_sentencepiece
from phi1_megatron.data.tokenizer import (
    WHITESPACE_RUNS,
    Tokenizer,
    codegen_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)
from phi1_megatron.errors import DataError, UsageError

CODE = [
    "def fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1)\n",
    "class Duck:\n\t\tdef quack(self):\n\t\t\treturn 'quack' * 3\n",
    "for i in range(10):\n    print(i, end=' ')\n",
] * 20

code_like = st.lists(
    st.sampled_from(["\n", "a", "def", "é", "世", "1", "'s", "<|endoftext|>", "🦆"])
    | st.characters(exclude_categories=["Cs"])
    | st.sampled_from([" ", "\t"]).flatmap(lambda c: st.integers(1, 70).map(lambda n: c * n))
).map("".join)


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> tuple[Path, Path]:
    return shared_data / "tokenizer" / "vocab.json", shared_data / "tokenizer" / "merges.txt"


@pytest.fixture(scope="module")
def codegen(vocabulary: tuple[Path, Path]) -> Tokenizer:
    return codegen_tokenizer(*vocabulary)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(CODE, 330)


def test_codegen_gives_the_ids_on_which_all_references_agree(
    codegen: Tokenizer, shared_data: Path
) -> None:
    recorded = json.loads((shared_data / "tokenizer" / "codegen_test_vectors.json").read_text())
    assert codegen.vocab_size == recorded["vocab_size"] == 50295
    assert codegen.eod_id == 50256
    assert len(recorded["vectors"]) == 30
    for vector in recorded["vectors"]:
        assert codegen.encode(vector["text"]) == vector["ids"], vector["text"]
        assert codegen.decode(vector["ids"]) == vector["text"]


@pytest.mark.parametrize(
    ("text", "token"), [(" " * n, 50288 - n) for n in range(2, 32)] + [("\t" * 9, 50287)]
)
def test_codegen_counts_whitespace_runs_down(codegen: Tokenizer, text: str, token: int) -> None:
    assert codegen.encode(text) == [token]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=code_like)
def test_codegen_equals_transformers_on_any_text(
    text: str, codegen: Tokenizer, reference_codegen: object
) -> None:
    assert codegen.encode(text) == reference_codegen.encode(text)  # type: ignore[attr-defined]
    assert codegen.decode(codegen.encode(text)) == text


@pytest.fixture(scope="module")
def reference_codegen(
    vocabulary: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> object:
    """transformers' own CodeGen tokenizer with the 38 tokens that its published files add."""
    from transformers import AddedToken, CodeGenTokenizer

    vocab, merges = (path.read_text(encoding="utf-8") for path in vocabulary)
    pairs = [tuple(line.split()) for line in merges.splitlines() if not line.startswith("#version")]
    reference = CodeGenTokenizer(vocab=json.loads(vocab), merges=pairs)
    reference.add_tokens([AddedToken(run, special=False) for run in WHITESPACE_RUNS])
    return reference


def test_gpt2_equals_transformers(vocabulary: tuple[Path, Path]) -> None:
    from transformers import GPT2Tokenizer

    vocab, merges = (path.read_text(encoding="utf-8") for path in vocabulary)
    pairs = [tuple(line.split()) for line in merges.splitlines() if not line.startswith("#version")]
    reference = GPT2Tokenizer(vocab=json.loads(vocab), merges=pairs)
    ours = gpt2_tokenizer(*vocabulary)
    assert (ours.vocab_size, ours.eod_id) == (50257, 50256)
    for text in [*CODE[:3], " 's 'll <|endoftext|> \n\n  世界 🦆"]:
        assert ours.encode(text) == reference.encode(text)


@pytest.mark.parametrize("config", [None, "phi", "gpt2"])
def test_a_saved_folder_opens_in_transformers_with_the_same_ids(
    trained: Tokenizer, tmp_path: Path, config: str | None
) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    if config is not None:  # as in an exported model's folder; it must not change the tokenizer
        (tmp_path / "config.json").write_text(json.dumps({"model_type": config}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def duck(n):\n        return a . b, n <|endoftext|>\t\t\n"
    ids = trained.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == trained.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", trained.eod_id)
    assert theirs.clean_up_tokenization_spaces is False
    assert len(theirs) == trained.vocab_size
    assert theirs.pad_token is None


def test_codegen_saved_opens_in_transformers_with_the_same_ids(
    codegen: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(codegen.save(tmp_path))
    for text in CODE[:3]:
        assert theirs(text)["input_ids"] == codegen.encode(text)


def test_save_then_load_keeps_everything(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "duck")
    for source in (tmp_path / "duck", tmp_path / "duck" / "tokenizer.json"):
        loaded = Tokenizer.load(source)
        assert loaded.fingerprint == trained.fingerprint
        assert (loaded.vocab_size, loaded.eod_id) == (trained.vocab_size, trained.eod_id)
        assert loaded.name == "duck"
    assert not list(tmp_path.rglob("*.partial"))


def test_training_gives_the_size_asked_for_with_the_added_tokens_last(trained: Tokenizer) -> None:
    assert trained.vocab_size == 330
    assert trained.eod_id == 330 - 39
    assert [trained.encode(run) for run in WHITESPACE_RUNS] == [[i] for i in range(292, 330)]


def test_training_spends_no_merge_on_indentation(trained: Tokenizer) -> None:
    vocabulary = json.loads(trained.to_json())["model"]["vocab"]
    assert not [token for token in vocabulary if "ĠĠ" in token or "ĉĉ" in token]


def test_training_twice_in_different_processes_gives_the_same_tokenizer(
    trained: Tokenizer,
) -> None:
    script = (
        "import json, sys\nfrom phi1_megatron.data.tokenizer import train_bpe\n"
        "print(train_bpe(json.load(sys.stdin), 330).fingerprint)"
    )
    environment = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(CODE),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == trained.fingerprint


def test_training_reads_its_texts_once_and_reports_progress() -> None:
    def stream() -> Iterator[str]:
        yield from CODE

    seen: list[tuple[int, int]] = []
    train_bpe(stream(), 300, on_progress=lambda *progress: seen.append(progress))
    assert seen[-1] == (sum(map(len, CODE)), len(CODE))


def test_a_small_corpus_gives_a_smaller_vocabulary_than_asked_for() -> None:
    assert 295 <= train_bpe(["ab ab"], 5000).vocab_size < 310


def test_training_refuses_a_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(UsageError, match=r"294.*already need 295"):
        train_bpe(CODE, 294)
    with pytest.raises(DataError, match="holds no text"):
        train_bpe([], 400)


def test_a_literal_end_of_text_is_the_id_by_default_and_text_on_request(trained: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert trained.encode(text).count(trained.eod_id) == 1
    as_text = trained.with_literal_eod("text")
    assert trained.eod_id not in as_text.encode(text)
    assert as_text.decode(as_text.encode(text)) == text
    assert as_text.fingerprint == trained.fingerprint
    assert as_text.encode("x\n    y") == trained.encode("x\n    y")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=code_like)
def test_any_text_comes_back_whole(text: str, trained: Tokenizer) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_a_truncating_tokenizer_json_does_not_cut_documents(
    trained: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads(trained.to_json())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(tmp_path).encode("q w e r t z u i o p")) > 4


def test_a_tokenizer_that_is_not_there_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gpt2 is no file or folder"):
        Tokenizer.load("gpt2")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    with pytest.raises(DataError, match="no end-of-document token: none of <eot>"):
        Tokenizer.load(tmp_path, eod_token="<eot>")


def test_codegen_refuses_another_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match=r"holds 2 entries, but .* 50,257"):
        codegen_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        gpt2_tokenizer(tmp_path / "absent.json", tmp_path / "merges.txt")


def test_a_tokenizer_and_a_data_set_s_definition_are_one(
    trained: Tokenizer, codegen: Tokenizer, vocabulary: tuple[Path, Path], tmp_path: Path
) -> None:
    assert codegen.definition == codegen_definition(*vocabulary)
    folder = trained.save(tmp_path / "duck")
    assert Tokenizer.load(folder).definition == load_definition(folder)
    assert (folder / "tokenizer.json").read_bytes() == trained.definition.content
    assert trained.with_literal_eod("text").definition.literal_eod == "text"


def test_a_definition_and_an_engine_load_no_tokenizer_library(repository: Path) -> None:
    script = (
        "import sys, phi1_megatron.data.definition, phi1_megatron.data.engine\n"
        "import phi1_megatron.data.sentencepiece_model, phi1_megatron.data.sentences\n"
        "print([m for m in ('tokenizers', 'sentencepiece', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=repository
    )
    assert done.stdout.strip() == "[]"


def test_what_the_library_cannot_open_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(trained.to_json())
    content["pre_tokenizer"] = {"type": "Quack"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"does not open: .*PreTokenizer"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return Tokenizer(train_sentencepiece(CODE, 340, name="pieces"))


def test_a_sentencepiece_model_loads_from_its_file_and_from_a_folder_without_json(
    pieces: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces.definition.content)
    for source in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = Tokenizer.load(source)
        assert loaded.fingerprint == pieces.fingerprint
        assert (loaded.vocab_size, loaded.eod_id) == (340, 1)
        assert loaded.name == tmp_path.name
        assert loaded.encode(CODE[0]) == pieces.encode(CODE[0])
    pieces.save(tmp_path)
    assert Tokenizer.load(tmp_path).definition.kind == "json"
    assert Tokenizer.load(tmp_path / "tokenizer.model").definition.kind == "sentencepiece"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=code_like)
def test_a_saved_sentencepiece_model_has_the_same_ids_in_transformers(
    text: str, pieces: Tokenizer, pieces_in_transformers: tuple[Tokenizer, object]
) -> None:
    as_json, theirs = pieces_in_transformers
    ids = pieces.encode(text)
    assert theirs(text)["input_ids"] == ids == as_json.encode(text)  # type: ignore[operator]
    decoded = theirs.decode(ids)  # type: ignore[attr-defined]
    assert decoded == pieces.decode(ids) == as_json.decode(ids) == text


@pytest.fixture(scope="module")
def pieces_in_transformers(
    pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, object]:
    from transformers import AutoTokenizer

    folder = pieces.save(tmp_path_factory.mktemp("pieces"))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", pieces.eod_id)
    assert (len(theirs), theirs.clean_up_tokenization_spaces) == (pieces.vocab_size, False)
    as_json = Tokenizer.load(folder)
    assert (as_json.vocab_size, as_json.eod_id) == (pieces.vocab_size, pieces.eod_id)
    return as_json, theirs


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_special_tokens_are_left_out_of_text_on_request(
    kind: str, trained: Tokenizer, pieces: Tokenizer
) -> None:
    tokenizer = trained if kind == "json" else pieces
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    as_text = tokenizer.with_literal_eod("text").encode("a<|endoftext|>b")
    assert tokenizer.eod_id not in as_text
    assert tokenizer.decode(as_text, skip_special_tokens=True) == "a<|endoftext|>b"


def test_a_model_without_a_sure_json_is_saved_alone_over_what_was_there(
    trained: Tokenizer, tmp_path: Path
) -> None:
    unigram = Tokenizer(train_sentencepiece(CODE, 340, "unigram"))
    trained.save(tmp_path)
    unigram.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert Tokenizer.load(tmp_path).fingerprint == unigram.fingerprint
    with pytest.raises(DataError, match=r"has no tokenizer\.json that surely gives the same ids"):
        unigram.to_json()
    trained.save(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_conversion_that_gives_other_ids_is_not_written(
    pieces: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(definition: object) -> object:
        content = as_tokenizer_json(definition)  # type: ignore[arg-type]
        assert content is not None
        del content["model"]["merges"][-1]  # of a single piece
        return content

    monkeypatch.setattr("phi1_megatron.data.tokenizer.as_tokenizer_json", spoiled)
    pieces.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
