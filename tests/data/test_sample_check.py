"""The sample check against right, wrong and missing ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.engine import open_engine
from phi1_megatron.data.sample_check import SampleCheck
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import DataError

CODE = "def größe(x):\n        return  x\t\t# <|endoftext|> 世界\n"


@pytest.fixture(scope="module")
def definition() -> TokenizerDefinition:
    return train_bpe([CODE * 20], 330).definition


@pytest.fixture(scope="module")
def ids(definition: TokenizerDefinition) -> npt.NDArray[np.uint16]:
    return open_engine(definition).encode([CODE]).ids


def test_right_ids_pass_and_are_counted(
    definition: TokenizerDefinition, ids: npt.NDArray[np.uint16]
) -> None:
    check = SampleCheck(definition)
    check.compare(CODE, ids, "a.jsonl")
    check.compare("", ids[:0], "a.jsonl")
    check.compare(CODE, ids.astype(np.int32), "b.jsonl")
    assert (check.documents, check.text_bytes) == (3, 2 * len(CODE.encode()))


@pytest.mark.parametrize(
    ("word", "near"), [("def", "'def größe(x)"), ("return", "return  x"), ("世", "世界")]
)
def test_a_wrong_id_is_named_with_its_place_and_the_text_around_it(
    word: str, near: str, definition: TokenizerDefinition, ids: npt.NDArray[np.uint16]
) -> None:
    at = open_engine(definition).encode([CODE[: CODE.index(word)]]).ids.size
    wrong = ids.copy()
    wrong[at] = definition.vocab_size - 1
    wrong[at + 1 :] = 0  # only the first difference is told
    with pytest.raises(DataError) as raised:
        SampleCheck(definition).compare(CODE, wrong, "corpus.jsonl")
    told = str(raised.value)
    assert "corpus.jsonl" in told
    assert f"token {at} is {wrong[at]}, not {ids[at]}" in told
    assert near in told
    assert "--engine huggingface" in told


def test_missing_and_surplus_ids_are_differences(
    definition: TokenizerDefinition, ids: npt.NDArray[np.uint16]
) -> None:
    check = SampleCheck(definition)
    last = ids.size - 1
    with pytest.raises(DataError, match=f"token {last} is none, not {ids[last]}"):
        check.compare(CODE, ids[:-1], "corpus.jsonl")
    with pytest.raises(DataError, match=f"token {ids.size} is 7, not none"):
        check.compare(CODE, np.append(ids, 7), "corpus.jsonl")


def test_the_reading_of_literal_special_tokens_is_the_definition_s(
    definition: TokenizerDefinition, ids: npt.NDArray[np.uint16]
) -> None:
    as_text = replace(definition, literal_eod="text")
    SampleCheck(as_text).compare(CODE, open_engine(as_text).encode([CODE]).ids, "corpus.jsonl")
    with pytest.raises(DataError, match=f"is {definition.eod_id}, not"):
        SampleCheck(as_text).compare(CODE, ids, "corpus.jsonl")


def test_an_engine_that_goes_wrong_on_some_texts_is_caught_there(
    definition: TokenizerDefinition,
) -> None:
    # A tokenizer whose runs of spaces also take the white space to their left.
    content = definition.content.replace(b'"lstrip":false', b'"lstrip":true')
    engine = open_engine(replace(definition, content=content), "fastokens")
    check = SampleCheck(definition)
    check.compare("for i in x: pass", engine.encode(["for i in x: pass"]).ids, "corpus.jsonl")
    text = "for i in x:\n    pass"
    ids = engine.encode([text]).ids
    with pytest.raises(DataError, match="encoded otherwise"):
        check.compare(text, ids, "corpus.jsonl")


def test_sentencepiece_models_are_their_own_reference(definition: TokenizerDefinition) -> None:
    check = SampleCheck(replace(definition, kind="sentencepiece", content=b"no tokenizer.json"))
    check.compare(CODE, np.asarray([1, 2, 3]), "corpus.jsonl")
    assert (check.documents, check.text_bytes) == (0, 0)
