r"""CodeGen's whitespace tokens at the speed of GPT-2's BPE.

CodeGen's tokenizer takes 38 added tokens (runs of 2 to 31 spaces and 2 to 9 tabs) out of the text,
leftmost and longest first, and hands what lies between them to GPT-2's BPE one by one. In source
code that makes a piece of every line, and the cutting costs more than the BPE itself.

Here the runs of spaces are marked in place instead: the last two bytes of each run (of each 31, in
longer ones) become ``\x0b\x0c``, and one pass of GPT-2's BPE over the whole text finds them. The
BPE is a derived one:

- ``Ġ…Ġ\x0b`` (k spaces and the mark) is a token with the id of the added token of k + 2 spaces;
  ``\x0b`` alone is that of two spaces. The merges that build it, ``Ġ`` + ``\x0b``, ``Ġ`` +
  ``Ġ\x0b`` and so on, come before all others, so that within a pre-token the mark takes in every
  space before it, whatever else they could have merged with.
- ``\x0c`` has a token that nothing merges with, and which is dropped from the result.

Why that is exact. Both marks are white space to GPT-2's regular expression, as the spaces were. Its
``\s+(?!\S)`` leaves the last white space character before a word to what follows, and only a plain
space is taken in by a following word; so ``\n    return`` is cut into ``\n  \x0b``, ``\x0c`` and
``return``, which is where CodeGen cuts, and a run that white space follows stays in one pre-token
with it, where merges do not cross a mark either. What is left of a text without marks is cut as
before, since a cut depends only on its neighbours and both neighbours are still white space.

Texts that hold one of the marks, ``\0`` (which joins a batch) or two tabs in a row take the plain
way. So do texts in which a special token is read as text, and there is nothing to gain elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import WHITESPACE_RUNS

_LONGEST = 31
_MARK, _DROPPED = 0x0B, 0x0C
_SPACE = ord(" ")
# GPT-2's alphabet for bytes: these are how its vocabulary spells 0x20, 0x0b and 0x0c.
_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR = "\u0120", "\u010b", "\u010c"
_PLAIN_ONLY = ("\t\t", "\x0b", "\x0c", "\0")
_SPACES = re.compile(rb" *")
_LONG_RUN = b" " * (_LONGEST + 1)


def derive(content: Mapping[str, Any]) -> tuple[dict[str, Any], int] | None:
    """The derived tokenizer of a parsed ``tokenizer.json`` and the id to drop from its results.

    None where the tokenizer is not CodeGen's in shape: byte-level BPE with GPT-2's regular
    expression, one special token, and the 38 runs as the other added tokens.
    """
    model = content.get("model") or {}
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    runs = {run: added.pop(run)["id"] for run in WHITESPACE_RUNS if run in added}
    pre_tokenizer = content.get("pre_tokenizer") or {}
    vocab = dict(model.get("vocab") or {})
    if not (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("ignore_merges")
        and not any(
            model.get(name)
            for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex")
        and not pre_tokenizer.get("add_prefix_space")
        and content.get("normalizer") is None
        and len(runs) == len(WHITESPACE_RUNS)
        and all(
            token["special"]
            and not any(token[name] for name in ("lstrip", "rstrip", "single_word"))
            and not set(token["content"]) & set(" \t\x0b\x0c\0")
            for token in added.values()
        )
        and {_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR} <= vocab.keys()
    ):
        return None
    # Ids must stay without gaps: the mark's own id and the runs of tabs are kept by placeholders.
    vocab["\0placeholder mark"] = vocab.pop(_MARK_CHAR)
    for run, token_id in runs.items():
        spaces = run.count(" ")
        name = _SPACE_CHAR * (spaces - 2) + _MARK_CHAR if spaces else f"\0placeholder {len(run)}"
        vocab[name] = token_id
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    marks = {_MARK_CHAR, _DROPPED_CHAR}
    merges = [
        *([_SPACE_CHAR, _SPACE_CHAR * k + _MARK_CHAR] for k in range(_LONGEST - 2)),
        *(list(pair) for pair in pairs if not marks & set("".join(pair))),
    ]
    derived = {
        **content,
        "added_tokens": list(added.values()),
        "model": {**model, "vocab": vocab, "merges": merges},
    }
    return derived, vocab[_DROPPED_CHAR]


def is_plain(text: str) -> bool:
    """Whether a text must not be marked."""
    return any(mark in text for mark in _PLAIN_ONLY)


def any_is_plain(texts: Sequence[str]) -> bool:
    """Whether any of the texts must not be marked."""
    return any(is_plain(text) for text in texts)


def mark(texts: Sequence[str]) -> list[str]:
    """The texts with their runs of spaces marked; none of them may be :func:`is_plain`."""
    joined = bytearray("\0".join(texts), "utf-8")
    if len(joined) < 2:
        return list(texts)
    space = np.frombuffer(joined, np.uint8) == _SPACE
    last = space[1:] & space[:-1]  # a space after a space ...
    last[:-1] &= ~space[2:]  # ... and no third one after it
    ends = last.view(np.uint8)
    data = np.frombuffer(joined, np.uint8)
    data[1:] -= ends * np.uint8(_SPACE - _DROPPED)
    data[:-1] -= ends * np.uint8(_SPACE - _MARK)
    del data
    _mark_long_runs(joined)
    return joined.decode().split("\0")


def _mark_long_runs(joined: bytearray) -> None:
    """Mark runs of more than 31 spaces as the tokens that they are: 31, 31, ... and the rest."""
    # The last two bytes of a run are marked already, so it is found by the spaces before them.
    start = joined.find(_LONG_RUN[:-2])
    while start >= 0:
        match = _SPACES.match(joined, start)
        assert match is not None
        end = match.end() + 2
        length = end - start
        if length % _LONGEST == 1:
            joined[end - 2 : end] = b"  "  # one space is left over, and belongs to what follows
        for chunk in range(start + _LONGEST, end + 1, _LONGEST):
            joined[chunk - 2 : chunk] = bytes((_MARK, _DROPPED))
        start = joined.find(_LONG_RUN[:-2], end)


def without(
    ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], dropped: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """``ids`` without ``dropped``, and how many are left between each two of ``offsets``."""
    kept = ids != dropped
    before = np.zeros(ids.size + 1, np.int32)
    np.cumsum(kept, out=before[1:])
    return ids[kept], np.diff(before[offsets]).astype(np.int64)
