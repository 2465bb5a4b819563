"""SentencePiece models against the library itself, whose ids they must have."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phi1_megatron.data import sentencepiece_model
from phi1_megatron.data.sentencepiece_model import (
    SentencePieceEngine,
    as_tokenizer_json,
    sentencepiece_definition,
    telling_texts,
)
from phi1_megatron.data.sentencepiece_training import train_sentencepiece
from phi1_megatron.errors import DataError

TEXTS = [
    "def fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1)\n",
    "class Duck:\n\t\tdef quack(self):\n\t\t\treturn 'quack' * 3  # ===== aaaa =====\n",
    "The duck said: quack, and quack it was. Éé 世界\n\n",
] * 20

any_text = st.lists(
    st.sampled_from(["▁", "▁▁", "▅", "\r\n", "\0", "def", " ", "\t", "=", "<0x41>", "</s>", "🦆"])
    | st.characters(exclude_categories=["Cs"])
    | st.sampled_from([" ", "\t", "=", "\n"]).flatmap(
        lambda c: st.integers(1, 70).map(lambda n: c * n)
    )
).map("".join)


def llama_like(**settings: Any) -> bytes:
    """A model with SentencePiece's own habits: a space put in front, ▁, <s> and </s>."""
    model = io.BytesIO()
    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(llama_like())
    return path


def saved(folder: Path, content: bytes, name: str = "duck.model") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def ids(engine: SentencePieceEngine, text: str) -> list[int]:
    return [int(token) for token in engine.encode([text]).ids]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_another_maker_s_model_gives_sentencepiece_s_own_ids(
    tmp_path: Path, model_type: str
) -> None:
    path = saved(tmp_path, llama_like(model_type=model_type, vocab_size=310))
    engine = SentencePieceEngine(sentencepiece_definition(path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*TEXTS, "", "  two  spaces ", "▁ \t\0 x", "<s> <unk> <0x41>", "ﬁ①"]
    encoded = engine.encode(texts)
    expected = [reference.encode(text) for text in texts]
    assert encoded.ids.tolist() == [token for tokens in expected for token in tokens]
    assert encoded.lengths.tolist() == [len(tokens) for tokens in expected]
    assert encoded.ids.dtype == np.uint16
    for tokens in expected:
        assert engine.decode(tokens) == reference.decode(tokens)
    assert engine.name == f"sentencepiece {sentencepiece.__version__}"


def test_a_batch_of_nothing_is_empty(llama: Path) -> None:
    encoded = SentencePieceEngine(sentencepiece_definition(llama)).encode([])
    assert (encoded.ids.size, encoded.lengths.size) == (0, 0)


def test_the_end_token_is_the_one_named_else_endoftext_else_the_model_s(
    llama: Path, tmp_path: Path
) -> None:
    assert (sentencepiece_definition(llama).eod_token, sentencepiece_definition(llama).eod_id) == (
        "</s>",
        2,
    )
    assert sentencepiece_definition(llama, "<s>").eod_id == 1
    both = saved(tmp_path, llama_like(control_symbols=["<|endoftext|>"]))
    assert sentencepiece_definition(both).eod_token == "<|endoftext|>"
    assert sentencepiece_definition(both).eod_id == 3
    with pytest.raises(DataError, match="no end-of-document token: <eot> is not in"):
        sentencepiece_definition(llama, "<eot>")
    none = saved(tmp_path, llama_like(eos_id=-1))
    with pytest.raises(DataError, match="duck has no end-of-document token"):
        sentencepiece_definition(none)


def test_a_folder_and_its_model_are_one_definition(llama: Path) -> None:
    assert sentencepiece_definition(llama) == sentencepiece_definition(llama.parent)
    assert sentencepiece_definition(llama).name == llama.parent.name
    assert sentencepiece_definition(llama).vocab_size == 330


def test_a_model_that_is_not_there_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone is no file or folder here"):
        sentencepiece_definition(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no tokenizer\.model"):
        sentencepiece_definition(tmp_path)
    for garbage in (b"", b"garbage"):
        with pytest.raises(DataError, match=r"duck\.model is not a SentencePiece model"):
            sentencepiece_definition(saved(tmp_path, garbage))


@pytest.mark.parametrize("kind", ["control_symbols", "user_defined_symbols"])
def test_a_literal_end_token_is_the_id_or_text_whatever_its_type_in_the_model(
    tmp_path: Path, kind: str
) -> None:
    content = llama_like(**{kind: ["<|endoftext|>"]})
    definition = sentencepiece_definition(saved(tmp_path, content))
    as_id = SentencePieceEngine(definition)
    as_text = SentencePieceEngine(replace(definition, literal_eod="text"))
    text = "quack<|endoftext|> duck"
    # A space that is there is one ▁, as the one that the model puts in front.
    assert ids(as_id, text) == [*ids(as_id, "quack"), definition.eod_id, *ids(as_id, "duck")]
    assert definition.eod_id not in ids(as_text, text)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    stock = as_id if kind == "user_defined_symbols" else as_text
    assert ids(stock, text) == reference.encode(text)
    for engine in (as_id, as_text):
        assert engine.decode(ids(engine, text)) == text
        assert ids(engine, "def quack") == reference.encode("def quack")
    assert as_id.decode(ids(as_id, text), skip_special_tokens=True) == "quack duck"


def test_decoding_shows_special_pieces_unless_told_not_to(llama: Path) -> None:
    engine = SentencePieceEngine(sentencepiece_definition(llama))
    tokens = [1, *ids(engine, "duck"), 2]
    assert engine.decode(np.array(tokens)).replace(" ", "") == "<s>duck</s>"
    assert engine.decode(tokens, skip_special_tokens=True) == "duck"
    assert engine.decode([*ids(engine, "duck"), 999_999]) == "duck"  # a padded model's row


@pytest.fixture(scope="module")
def plain() -> SentencePieceEngine:
    return SentencePieceEngine(train_sentencepiece(TEXTS, 400))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=any_text)
def test_a_long_text_encodes_in_parts_as_it_does_whole(
    text: str, plain: SentencePieceEngine
) -> None:
    whole = ids(plain, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_model, "_LONG_TEXT", 3)
        assert ids(plain, text) == whole


def test_a_long_text_is_cut_only_where_a_model_allows(
    plain: SentencePieceEngine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentencepiece_model, "_LONG_TEXT", 5)
    text = TEXTS[0]
    assert len(list(plain._stretches(text))) > 3
    other = SentencePieceEngine(sentencepiece_definition(llama))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama))
    assert ids(other, text) == reference.encode(text)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=any_text)
@example(text="a▁b▁▁ ▁")
def test_a_model_as_tokenizer_json_gives_the_same_ids_and_text(
    text: str, plain: SentencePieceEngine, converted: Any
) -> None:
    same = ids(plain, text)
    assert converted.encode(text).ids == same
    assert converted.decode(same, skip_special_tokens=False) == plain.decode(same)


@pytest.fixture(scope="module")
def converted(plain: SentencePieceEngine) -> Any:
    import json

    import tokenizers

    content = as_tokenizer_json(plain._definition)
    assert content is not None
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def test_a_model_with_written_spaces_converts_too(tmp_path: Path) -> None:
    import json

    import tokenizers

    gemma_like = llama_like(
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["▁▁", "▁▁▁▁", "\t\t"],
    )
    definition = sentencepiece_definition(saved(tmp_path, gemma_like))
    content = as_tokenizer_json(definition)
    assert content is not None
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    engine = SentencePieceEngine(definition)
    for text in [*TEXTS, "a     b ▁▁▁ \t\t\t", " x"]:
        assert backend.encode(text).ids == ids(engine, text)
        assert backend.decode(ids(engine, text)) == engine.decode(ids(engine, text))


def test_a_model_that_cannot_be_a_tokenizer_json_for_sure_is_none(
    llama: Path, tmp_path: Path
) -> None:
    assert as_tokenizer_json(sentencepiece_definition(llama)) is None  # a space put in front
    unigram = train_sentencepiece(TEXTS, 340, "unigram")
    assert as_tokenizer_json(unigram) is None


def test_texts_that_tell_conversions_apart_hold_overlapping_merges_and_every_piece() -> None:
    texts = telling_texts(train_sentencepiece(["aaaa aaaa"] * 50, 302))
    assert "aaaaaa" in texts  # aa + aa + aa: aaaa at two places
    assert "aaaaaa aaaa aa " in texts  # aa aaaa _aaaa _a a _, in this order
