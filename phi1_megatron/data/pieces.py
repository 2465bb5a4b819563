"""Token ids as text that shows where each token begins and ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

_LONGEST_GROUP = 8
"""Tokens that may share one character; UTF-8 takes 4 bytes, and a token is a byte at least."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one token; of several where one character is spread over them."""

    text: str
    tokens: int = 1


def pieces(ids: Iterable[int], decoder: Decoder) -> Iterator[Piece]:
    """The text of each token; an id that the tokenizer does not know shows as a number."""
    # The tokens before are decoded too: some tokenizers drop a space where a text begins.
    before: list[int] = []
    group: list[int] = []
    for token in ids:
        if not 0 <= token < decoder.vocab_size:
            if group:
                yield _piece(before, group, decoder)
            yield Piece(f"⟨{token}⟩")
            before, group = [], []
            continue
        group.append(token)
        piece = _piece(before, group, decoder)
        if not piece.text.endswith("\N{REPLACEMENT CHARACTER}") or len(group) == _LONGEST_GROUP:
            yield piece
            before, group = group, []
    if group:
        yield _piece(before, group, decoder)


def _piece(before: list[int], group: list[int], decoder: Decoder) -> Piece:
    text = decoder.decode(before + group)[len(decoder.decode(before)) :]
    return Piece(text or "".join(f"⟨{token}⟩" for token in group), len(group))


def visible(text: str) -> str:
    """``text`` with its line ends, tabs and invisible characters shown by signs.

    What would move a terminal's cursor or change its colours does not pass.
    """
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text)


_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "→"}
