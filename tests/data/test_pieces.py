"""Tokens as text with visible boundaries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.data.pieces import Piece, pieces, visible
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe

TEXT = "def f(x):\n    return 'héllo 世界 🙂🏽'\t# \ufffd\r\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["def f(x):\n    return x\n"] * 9, 300)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_the_pieces_joined_are_the_text_and_every_token_is_in_one(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    found = list(pieces(ids, tokenizer))
    assert "".join(piece.text for piece in found) == text
    assert sum(piece.tokens for piece in found) == len(ids)


def test_a_character_of_several_tokens_is_one_piece(tokenizer: Tokenizer) -> None:
    found = list(pieces(tokenizer.encode(TEXT), tokenizer))
    assert "".join(piece.text for piece in found) == TEXT
    assert Piece("世", 3) in found
    assert Piece("🏽", 4) in found
    assert Piece("    ") in found


def test_half_a_character_and_an_unknown_id_do_not_hide_what_follows(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("世")[:2]
    found = list(pieces([*half, 70_000, -3, *tokenizer.encode("x")], tokenizer))
    assert [piece.text for piece in found[1:]] == ["⟨70000⟩", "⟨-3⟩", "x"]
    assert found[0].tokens == 2


def test_the_end_of_document_token_is_shown(tokenizer: Tokenizer) -> None:
    assert list(pieces([tokenizer.eod_id], tokenizer)) == [Piece("<|endoftext|>")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n", "a⏎"),
        ("\t\r\n", "→␍⏎"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\u200b\u202e\xa0", "a⟨U+200B⟩⟨U+202E⟩⟨U+00A0⟩"),
        ("  世é 🙂", "  世é 🙂"),
    ],
)
def test_nothing_invisible_and_nothing_that_moves_a_cursor_passes(text: str, shown: str) -> None:
    assert visible(text) == shown
