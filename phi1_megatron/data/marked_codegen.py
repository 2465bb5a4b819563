r"""CodeGen's whitespace tokens at the speed of GPT-2's BPE.

CodeGen's tokenizer takes 38 added tokens (runs of 2 to 31 spaces and 2 to 9 tabs) out of the text,
leftmost and longest first, and hands what lies between them to GPT-2's BPE one by one. In source
code that makes a piece of every line, and the cutting costs more than the BPE itself. Here one pass
of a derived BPE goes over the whole text, and the runs are found on either side of it.

**Spaces** are marked before: the last two bytes of each run (of each 31, in longer ones) become
``\x0b\x0c``. In the derived BPE, ``Ġ…Ġ\x0b`` (k spaces and the mark) is a token with the id of the
added token of k + 2 spaces, and ``\x0b`` alone is that of two. The merges that build them, ``Ġ`` +
``\x0b``, ``Ġ`` + ``Ġ\x0b`` and so on, come before all others, so a mark takes in every space before
it, whatever else they could have merged with. The ``\x0c`` after a mark is dropped from the result.

**Tabs** are gathered after: GPT-2's vocabulary has no merge with a tab in it, so each is a token of
its own, and a row of them in the result is a run in the text.

Why that is exact. Both marks are white space to GPT-2's regular expression, as the spaces were. Its
``\s+(?!\S)`` leaves the last white space character before a word to what follows, and only a plain
space is taken in by a following word; so ``\n    return`` is cut into ``\n  \x0b``, ``\x0c`` and
``return``, which is where CodeGen cuts. A run that white space follows shares a pre-token with it,
but no merge crosses a mark or a tab. What is left is cut as before, since a cut depends only on
whether its neighbours are white space, and they are.

Texts that hold ``\x0b`` or ``\0`` (which joins a batch) take the plain way; so do texts with
``\x0c`` or a run of tabs where the vocabulary has merges with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import WHITESPACE_RUNS

_LONGEST_SPACES, _LONGEST_TABS = 31, 9
_SPACE, _MARK, _DROPPED = 0x20, 0x0B, 0x0C
# GPT-2's alphabet for bytes: how its vocabulary spells 0x20, 0x0b, 0x0c and 0x09.
_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR, _TAB_CHAR = "\u0120", "\u010b", "\u010c", "\u0109"
_SPACES = re.compile(rb" *")
_WINDOW = 1 << 16

Ids = npt.NDArray[Any]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MarkedForm:
    r"""The derived tokenizer, and what to do with its ids.

    Attributes
    ----------
    content
        Its ``tokenizer.json``, parsed.
    dropped_id
        Of ``\\x0c``: to be dropped after a run of spaces.
    is_spaces
        bool [vocabulary], whether an id is a run of spaces.
    tab_id, tab_runs
        Of a tab, and of n tabs at [n]; None where tabs have merges.
    form_feeds
        Whether a text may hold ``\\x0c``.
    """

    content: dict[str, Any]
    dropped_id: int
    is_spaces: npt.NDArray[np.bool_]
    tab_id: int
    tab_runs: npt.NDArray[np.int64] | None
    form_feeds: bool

    def takes(self, text: str) -> bool:
        """Whether a text can be encoded in this form."""
        return not (
            "\x0b" in text
            or "\0" in text
            or (self.tab_runs is None and "\t\t" in text)
            or (not self.form_feeds and "\x0c" in text)
        )

    def mark(self, texts: Sequence[str]) -> list[str] | None:
        """The texts with their runs of spaces marked; None if one is not to be taken."""
        joined = bytearray(b"\0").join([text.encode() for text in texts])
        if (
            b"\x0b" in joined
            or (not self.form_feeds and b"\x0c" in joined)
            or (self.tab_runs is None and b"\t\t" in joined)
        ):
            return None
        _mark_runs(joined)
        return _cut(joined, len(texts))

    def gather(self, ids: Ids, offsets: Offsets) -> tuple[Ids, Offsets]:
        """The ids of the texts that were marked, and how many each has, from those of the marked.

        ``offsets`` [texts + 1]: where each text's ids begin.
        """
        after = np.flatnonzero(ids == self.dropped_id)
        # A form feed of the text itself follows no run of spaces: its own mark comes between.
        after = after[self.is_spaces[ids[after - 1]] & (after > 0)]
        kept = np.ones(ids.size, bool)
        kept[after] = False
        offsets = offsets - np.searchsorted(after, offsets)
        ids = ids[kept]
        if self.tab_runs is not None:
            ids, offsets = _gather_tabs(ids, offsets, self.tab_id, self.tab_runs)
        return ids, np.diff(offsets)


def derive(content: Mapping[str, Any]) -> MarkedForm | None:
    """The marked form of a parsed ``tokenizer.json``.

    None where the tokenizer is not CodeGen's in shape: byte-level BPE with GPT-2's regular
    expression, special tokens without spaces, and the 38 runs as the other added tokens.
    """
    model = content.get("model") or {}
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    runs = {run: added.pop(run)["id"] for run in WHITESPACE_RUNS if run in added}
    vocab = dict(model.get("vocab") or {})
    alphabet = {_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR, _TAB_CHAR}
    if not (
        _is_plain_byte_level(content)
        and len(runs) == len(WHITESPACE_RUNS)
        and all(map(_cuts_where_it_stands, added.values()))
        and alphabet <= vocab.keys()
    ):
        return None
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = set("".join(left + right for left, right in merges)) & alphabet
    tab_id = vocab[_TAB_CHAR]
    tab_runs = None
    if _TAB_CHAR not in merged:
        lengths = range(2, _LONGEST_TABS + 1)
        tab_runs = np.asarray([0, tab_id, *(runs["\t" * n] for n in lengths)], np.int64)
    is_spaces = np.zeros(max([*vocab.values(), *runs.values()]) + 1, bool)
    # Ids must stay without gaps: the mark's own id and the runs of tabs are kept by placeholders.
    vocab["\0mark"] = vocab.pop(_MARK_CHAR)
    for run, token_id in runs.items():
        spaces = run.count(" ")
        is_spaces[token_id] = bool(spaces)
        name = _SPACE_CHAR * (spaces - 2) + _MARK_CHAR if spaces else f"\0{len(run)} tabs"
        vocab[name] = token_id
    marks = {_MARK_CHAR, _DROPPED_CHAR}
    derived_merges = [
        *([_SPACE_CHAR, _SPACE_CHAR * k + _MARK_CHAR] for k in range(_LONGEST_SPACES - 2)),
        *((left, right) for left, right in merges if not marks & set(left + right)),
    ]
    return MarkedForm(
        content={
            **content,
            "added_tokens": list(added.values()),
            "model": {**model, "vocab": vocab, "merges": derived_merges},
        },
        dropped_id=vocab[_DROPPED_CHAR],
        is_spaces=is_spaces,
        tab_id=tab_id,
        tab_runs=tab_runs,
        form_feeds=_DROPPED_CHAR not in merged,
    )


def _is_plain_byte_level(content: Mapping[str, Any]) -> bool:
    model, pre_tokenizer = content.get("model") or {}, content.get("pre_tokenizer") or {}
    odd = ("dropout", "ignore_merges", "unk_token", "continuing_subword_prefix")
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in (*odd, "end_of_word_suffix"))
        and content.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and bool(pre_tokenizer.get("use_regex"))
        and not pre_tokenizer.get("add_prefix_space")
    )


def _cuts_where_it_stands(token: Mapping[str, Any]) -> bool:
    """Whether an added token takes nothing of the white space around it."""
    return (
        bool(token["special"])
        and not any(token[name] for name in ("lstrip", "rstrip", "single_word"))
        and not any(char.isspace() or char == "\0" for char in token["content"])
    )


def _mark_runs(joined: bytearray) -> None:
    _mark_ends(np.frombuffer(joined, np.uint8))
    _mark_long_runs(joined)


def _mark_ends(data: npt.NDArray[np.uint8]) -> None:
    """Put the marks on the last two of every row of spaces."""
    # In windows, so that what is held beside the text stays small, and in the cache.
    for start in range(0, data.size, _WINDOW):
        # One byte more on either side tells where a run goes on.
        window = data[max(0, start - 1) : start + _WINDOW + 1]
        space = window == _SPACE
        last = space[1:] & space[:-1]  # a space after a space ...
        np.greater(last[:-1], space[2:], out=last[:-1])  # ... and none after it
        if start + _WINDOW < data.size:
            last[-1] = False  # the byte after the window is the next window's
        ends = last.view(np.uint8)
        change = np.multiply(ends, _SPACE - _DROPPED, dtype=np.uint8)
        np.subtract(window[1:], change, out=window[1:])
        np.multiply(ends, _SPACE - _MARK, out=change)
        np.subtract(window[:-1], change, out=window[:-1])


def _cut(joined: bytearray, texts: int) -> list[str] | None:
    """The texts between the zero bytes; None if one of them held a zero byte itself."""
    found: list[str] = []
    start = 0
    with memoryview(joined) as view:
        while (end := joined.find(b"\0", start)) >= 0:
            found.append(str(view[start:end], "utf-8"))
            start = end + 1
        found.append(str(view[start:], "utf-8"))
    return found if len(found) == texts else None


def _mark_long_runs(joined: bytearray) -> None:
    """Mark runs of more than 31 spaces as the tokens that they are: 31, 31, ... and the rest."""
    # The last two bytes of a run are marked already, so it is found by the spaces before them.
    begins = b" " * (_LONGEST_SPACES - 1)
    start = joined.find(begins)
    while start >= 0:
        match = _SPACES.match(joined, start)
        assert match is not None
        end = match.end() + 2
        del match  # it holds the buffer
        if (end - start) % _LONGEST_SPACES == 1:
            joined[end - 2 : end] = b"  "  # one space is left over, and belongs to what follows
        for chunk in range(start + _LONGEST_SPACES, end + 1, _LONGEST_SPACES):
            joined[chunk - 2 : chunk] = bytes((_MARK, _DROPPED))
        start = joined.find(begins, end)


def _gather_tabs(
    ids: Ids, offsets: Offsets, tab_id: int, runs: npt.NDArray[np.int64]
) -> tuple[Ids, Offsets]:
    """Replace rows of tabs by the tokens of runs; ``runs`` [n] is the id of n tabs."""
    tabs = np.flatnonzero(ids == tab_id)
    if tabs.size < 2:
        return ids, offsets
    text_of = np.searchsorted(offsets, tabs, side="right")
    begins = np.ones(tabs.size, bool)
    begins[1:] = (np.diff(tabs) != 1) | (np.diff(text_of) != 0)
    if begins.all():
        return ids, offsets
    firsts = np.flatnonzero(begins)
    lengths = np.diff(np.append(firsts, tabs.size))
    place = np.arange(tabs.size) - np.repeat(firsts, lengths)  # of each tab in its run
    left = np.repeat(lengths, lengths) - place
    chunk = place % _LONGEST_TABS == 0
    ids = ids.copy()
    ids[tabs[chunk]] = runs[np.minimum(left[chunk], _LONGEST_TABS)]
    gone = tabs[~chunk]
    kept = np.ones(ids.size, bool)
    kept[gone] = False
    return ids[kept], offsets - np.searchsorted(gone, offsets)
