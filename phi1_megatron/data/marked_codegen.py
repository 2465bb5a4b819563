r"""CodeGen's whitespace tokens at the speed of GPT-2's BPE.

CodeGen's tokenizer takes 38 added tokens (runs of 2 to 31 spaces and 2 to 9 tabs) out of the text,
leftmost and longest first, and hands what lies between them to GPT-2's BPE one by one. In source
code that makes a piece of every line, and the cutting costs more than the BPE itself. Here one pass
of a derived BPE goes over the whole text, and the runs are found on either side of it.

**Spaces** are marked before: the last two bytes of each run (of each 31, in longer ones) become
``\x0b\x0c``; a single space stays one. In the derived BPE, ``Ġ…Ġ\x0b`` (k spaces and the mark) is a
token with the id of the added token of k + 2 spaces, and ``\x0b`` alone is that of two. The merges
that build them, ``Ġ`` + ``\x0b``, ``Ġ`` + ``Ġ\x0b`` and so on, come before all others, so a mark
takes in every space before it, whatever else they could have merged with. The ``\x0c`` after a mark
is dropped from the result.

**Tabs** are gathered after: GPT-2's vocabulary has no merge with a tab in it, so each is a token of
its own, and a row of them in the result is a run in the text.

Why that is exact. Both marks are white space to GPT-2's regular expression, as the spaces were. Its
``\s+(?!\S)`` leaves the last white space character before a word to what follows, and only a plain
space is taken in by a following word; so ``\n    return`` is cut into ``\n  \x0b``, ``\x0c`` and
``return``, which is where CodeGen cuts. A run that white space follows shares a pre-token with it,
but no merge crosses a mark or a tab. What is left is cut as before, since a cut depends only on
whether its neighbours are white space, and they are.

Texts that hold ``\x0b`` take the plain way; so do texts with ``\x0c`` or a run of tabs where the
vocabulary has merges with them. A ``\x0c`` of the text itself is known from a mark's by what stands
before it: a mark's own follows the token of a run, and another one cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import WHITESPACE_RUNS

_LONGEST_SPACES, _LONGEST_TABS = 31, 9
_SPACE, _MARK, _DROPPED = 0x20, 0x0B, 0x0C
# GPT-2's alphabet for bytes: how its vocabulary spells 0x20, 0x0b, 0x0c and 0x09.
_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR, _TAB_CHAR = "\u0120", "\u010b", "\u010c", "\u0109"
_SPACES = re.compile(rb" *")
_WINDOW = 1 << 16
_SEPARATOR = b"\n"  # between texts in a buffer; any byte that is no space
_WORD_OF_SPACES = int.from_bytes(b" " * 8, "little")

Ids = npt.NDArray[Any]
Offsets = npt.NDArray[np.int64]


class Marked(NamedTuple):
    """Texts with their runs of spaces marked, and what must be looked for in their ids."""

    texts: list[str]
    form_feeds: bool
    tabs: bool


@dataclass(frozen=True)
class MarkedForm:
    r"""The derived tokenizer, how to bring texts into its form, and its ids back.

    Attributes
    ----------
    content
        Its ``tokenizer.json``, parsed.
    dropped_id
        Of ``\x0c``: to be dropped after a run of spaces.
    space_runs
        Ids of the runs of spaces.
    tab_runs
        Ids of n tabs at [n], a single one's too; None where tabs have merges.
    form_feeds
        Whether a text may hold ``\x0c``.
    """

    content: dict[str, Any]
    dropped_id: int
    space_runs: npt.NDArray[np.int64]
    tab_runs: npt.NDArray[np.int64] | None
    form_feeds: bool

    def takes(self, text: str | bytearray) -> bool:
        """Whether a text, or the bytes of several, can be encoded in this form."""
        data = text.encode() if isinstance(text, str) else text
        return not (
            b"\x0b" in data
            or (not self.form_feeds and b"\x0c" in data)
            or (self.tab_runs is None and b"\t\t" in data)
        )

    def mark(self, texts: Sequence[str]) -> Marked | None:
        """The texts with their runs of spaces marked; None if one of them is not to be taken."""
        # One buffer for all texts: a call of numpy's for each of them would cost more than marking.
        parts = [text.encode() for text in texts]
        joined = bytearray(_SEPARATOR).join([*parts, b""])
        if not self.takes(joined):
            return None
        form_feeds, tabs = b"\x0c" in joined, b"\t" in joined
        _mark_runs(joined)
        marked = []
        view, begin = memoryview(joined), 0
        for part in parts:  # marking keeps every text's place and size
            end = begin + len(part)
            marked.append(str(view[begin:end], "utf-8"))
            begin = end + len(_SEPARATOR)
        return Marked(marked, form_feeds, tabs)

    def gather(self, marked: Marked, ids: Ids, offsets: Offsets) -> tuple[Ids, Offsets]:
        """The ids of the texts that were marked, and how many each has, from those of the marked.

        ``offsets`` [texts + 1]: where each text's ids begin. ``ids`` is written to.
        """
        kept = ids != self.dropped_id
        if marked.form_feeds:  # one of the text itself follows no run: a mark's own is between
            kept[:1] = True
            kept[1:] |= np.isin(ids[:-1], self.space_runs, invert=True)
        if marked.tabs and self.tab_runs is not None:
            _gather_tabs(ids, kept, offsets, self.tab_runs)
        return _compact(ids, kept, offsets)


def may_be_marked(content: bytes) -> bool:
    """Whether the text of a ``tokenizer.json`` is worth parsing for :func:`derive`."""
    return WHITESPACE_RUNS[0].encode() in content


def derive(content: Mapping[str, Any]) -> MarkedForm | None:
    """The marked form of a parsed ``tokenizer.json``.

    None where the tokenizer is not CodeGen's in shape: byte-level BPE with GPT-2's regular
    expression, the 38 runs as added tokens, and no others but special ones without white space.
    """
    model = content.get("model") or {}
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    runs = {run: added.pop(run) for run in WHITESPACE_RUNS if run in added}
    vocab = dict(model.get("vocab") or {})
    alphabet = {_SPACE_CHAR, _MARK_CHAR, _DROPPED_CHAR, _TAB_CHAR}
    if not (
        _is_plain_byte_level(content)
        and len(runs) == len(WHITESPACE_RUNS)
        and all(_is_plain(token) and not token.get("special") for token in runs.values())
        and all(_is_plain(token) and token.get("special") for token in added.values())
        and not any(char.isspace() for char in "".join(added))
        and alphabet <= vocab.keys()
        and _without_gaps(vocab, [*runs.values(), *added.values()])
    ):
        return None
    run_ids = {run: int(token["id"]) for run, token in runs.items()}
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()
    ]
    merged = set("".join(left + right for left, right in merges)) & alphabet
    marks = {_MARK_CHAR, _DROPPED_CHAR}
    derived_merges = [
        *([_SPACE_CHAR, _SPACE_CHAR * k + _MARK_CHAR] for k in range(_LONGEST_SPACES - 2)),
        *((left, right) for left, right in merges if marks.isdisjoint(left + right)),
    ]
    for n in range(2, _LONGEST_SPACES + 1):
        vocab[_SPACE_CHAR * (n - 2) + _MARK_CHAR] = run_ids[" " * n]
    # fastokens takes no vocabulary with gaps; these names are no text's.
    taken = set(vocab.values())
    vocab.update((f"\0{gap}", gap) for gap in range(max(taken)) if gap not in taken)
    return MarkedForm(
        content={
            **content,
            "added_tokens": list(added.values()),
            "model": {**model, "vocab": vocab, "merges": derived_merges},
        },
        dropped_id=vocab[_DROPPED_CHAR],
        space_runs=np.asarray([run_ids[" " * n] for n in range(2, _LONGEST_SPACES + 1)]),
        tab_runs=None if _TAB_CHAR in merged else _tab_runs(vocab[_TAB_CHAR], run_ids),
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
        and bool(pre_tokenizer.get("use_regex", True))
        and not pre_tokenizer.get("add_prefix_space", True)
    )


def _is_plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token takes nothing of what is around it."""
    return not any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))


def _without_gaps(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> bool:
    ids = {*vocab.values(), *(token["id"] for token in added)}
    return len(set(vocab.values())) == len(vocab) and max(ids) + 1 == len(ids)


def _tab_runs(tab_id: int, run_ids: Mapping[str, int]) -> npt.NDArray[np.int64]:
    runs = [run_ids["\t" * n] for n in range(2, _LONGEST_TABS + 1)]
    return np.asarray([-1, tab_id, *runs], np.int64)


def _mark_runs(joined: bytearray) -> None:
    """Mark the runs of spaces in a buffer, which must not end with one."""
    long_runs = _long_runs(joined)
    _mark_ends(np.frombuffer(joined, np.uint8))
    mark = bytes((_MARK, _DROPPED))
    for begin, end in long_runs:  # as the tokens that they are: 31, 31, ... and the rest
        if (end - begin) % _LONGEST_SPACES == 1:
            joined[end - 2 : end] = b"  "  # one space is left over, and belongs to what follows
        for chunk in range(begin + _LONGEST_SPACES, end + 1, _LONGEST_SPACES):
            joined[chunk - 2 : chunk] = mark


def _mark_ends(data: npt.NDArray[np.uint8]) -> None:
    """Put the marks on the last two of every row of spaces."""
    # In windows, so that what is held beside the text stays small, and in the cache.
    for start in range(1, data.size, _WINDOW):
        window = data[start - 1 : start + _WINDOW + 1]  # with the neighbours
        space = window == _SPACE
        last = space[1:-1] > space[2:]  # a space, and none after it ...
        last &= space[:-2]  # ... but one before
        ends = last.view(np.uint8)
        change = ends * np.uint8(_SPACE - _DROPPED)
        window[1:-1] -= change
        window[:-2] -= change
        window[:-2] -= ends  # the mark is one less than what is dropped


def _long_runs(joined: bytearray) -> list[tuple[int, int]]:
    """Where the runs of more than 31 spaces begin and end."""
    # Each holds three of the buffer's aligned 8-byte words, and an eighth as many are looked at.
    words = np.frombuffer(joined, np.uint64, len(joined) // 8) == _WORD_OF_SPACES
    runs: list[tuple[int, int]] = []
    end = 0
    for word in np.flatnonzero(words[:-2] & words[1:-1] & words[2:]).tolist():
        inside = 8 * word
        if inside < end:
            continue
        before = max(inside - 8, 0)
        begin = before + len(joined[before:inside].rstrip(b" "))
        match = _SPACES.match(joined, inside)
        end = inside if match is None else match.end()
        if end - begin > _LONGEST_SPACES:
            runs.append((begin, end))
    return runs


def _compact(ids: Ids, kept: npt.NDArray[np.bool_], offsets: Offsets) -> tuple[Ids, Offsets]:
    """``ids`` where ``kept``, moved together in place, and how many are left of each text."""
    ends = np.zeros_like(offsets)
    size = 0
    for start in range(0, ids.size, _WINDOW):  # as above; places are 8 bytes each
        places = np.flatnonzero(kept[start : start + _WINDOW])
        texts = slice(*np.searchsorted(offsets, (start + 1, start + _WINDOW + 1)))
        ends[texts] = size + np.searchsorted(places, offsets[texts] - start)
        ids[size : size + places.size] = ids[start : start + _WINDOW].take(places)
        size += places.size
    return ids[:size], np.diff(ends)


def _gather_tabs(
    ids: Ids, kept: npt.NDArray[np.bool_], offsets: Offsets, runs: npt.NDArray[np.int64]
) -> None:
    """Make rows of tabs the tokens of runs; ``runs`` [n] is the id of n tabs."""
    tabs = np.flatnonzero(ids == runs[1])
    begins = np.diff(tabs, prepend=-2) != 1
    begins |= np.isin(tabs, offsets)
    if begins.all():
        return
    firsts = np.flatnonzero(begins)
    lengths = np.diff(firsts, append=tabs.size)
    left = np.repeat(firsts + lengths, lengths) - np.arange(tabs.size)  # to the row's end
    chunk = (np.repeat(lengths, lengths) - left) % _LONGEST_TABS == 0
    ids[tabs[chunk]] = runs[np.minimum(left[chunk], _LONGEST_TABS)]
    kept[tabs[~chunk]] = False
