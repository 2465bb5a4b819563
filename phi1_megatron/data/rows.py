"""One line of JSONL, or one row of a table, to the texts asked for, or to the reason why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

# Reasons a row is set aside; they are keys of reports, so they stay as they are.
BROKEN_JSON = "broken JSON"
MISSING_KEY = "missing key"
WRONG_TYPE = "wrong type"
INVALID_UTF8 = "invalid UTF-8"
EMPTY_TEXT = "empty text"
TOO_LONG = "line too long"
DAMAGED_FILE = "truncated or damaged compression"

Texts = tuple[str, ...]
"""One text for each key asked for, in the keys' order."""


class Bad(NamedTuple):
    """Why a row cannot be used."""

    reason: str
    detail: str


class RowParser:
    """Finds the texts of ``json_keys`` in rows."""

    def __init__(self, json_keys: Sequence[str]) -> None:
        self.json_keys = tuple(json_keys)
        fields = [(f"text_{i}", str) for i in range(len(self.json_keys))]
        rename = {f"text_{i}": key for i, key in enumerate(self.json_keys)}
        self._decoder = msgspec.json.Decoder(
            msgspec.defstruct("Row", fields, rename=rename, gc=False)
        )

    def line(self, line: bytes) -> Texts | Bad | None:
        """The texts of one JSON object; None for a blank line."""
        try:
            texts: Texts = msgspec.structs.astuple(self._decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            if not line.strip():
                return None
            # msgspec is strict where Python's json is not (NaN); the slow look decides, and names
            # the reason.
            outcome = self._slowly(line)
            return outcome if isinstance(outcome, Bad) else self._not_empty(outcome)
        return self._not_empty(texts)

    def lines(self, block: bytes | memoryview) -> tuple[list[str], ...] | None:
        """For each key the texts of a block of whole lines; None where one of them is not as it
        should be, so that each must be looked at by :meth:`line`."""
        try:
            rows = self._decoder.decode_lines(block)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        columns = tuple(
            [getattr(row, f"text_{i}") for row in rows] for i in range(len(self.json_keys))
        )
        return columns if all(all(column) for column in columns) else None

    def cells(self, cells: Sequence[Any]) -> Texts | Bad:
        """The texts of a table's row: pyarrow scalars, one for each key."""
        try:
            texts = tuple(cell.as_py() for cell in cells)
        except UnicodeDecodeError as error:
            return Bad(INVALID_UTF8, str(error))
        for key, text in zip(self.json_keys, texts, strict=True):
            if not isinstance(text, str):
                return Bad(WRONG_TYPE, f"{key!r} is {_type_name(text)}, not a string")
        return self._not_empty(texts)

    def _not_empty(self, texts: Texts) -> Texts | Bad:
        if all(texts):
            return texts
        return Bad(EMPTY_TEXT, f"{self.json_keys[texts.index('')]!r} is empty")

    def _slowly(self, line: bytes) -> Texts | Bad:
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Bad(INVALID_UTF8, str(error))
        except (ValueError, RecursionError) as error:
            return Bad(BROKEN_JSON, str(error))
        if not isinstance(row, dict):
            return Bad(WRONG_TYPE, f"the line is {_type_name(row)}, not an object")
        texts = []
        for key in self.json_keys:
            if key not in row:
                return Bad(MISSING_KEY, f"no {key!r}")
            text = row[key]
            if not isinstance(text, str):
                return Bad(WRONG_TYPE, f"{key!r} is {_type_name(text)}, not a string")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                return Bad(INVALID_UTF8, str(error))
            texts.append(text)
        return tuple(texts)


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "not text")
