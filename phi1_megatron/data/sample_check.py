"""Hold what an engine gives against Hugging Face's tokenizers, while a run goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.engine import open_reference
from phi1_megatron.errors import DataError

_AROUND = 20


class SampleCheck:
    """Compares documents' ids with the reference's, and stops at the first difference.

    SentencePiece models are encoded by their own library, which is the reference: nothing is
    compared.

    Attributes
    ----------
    documents, text_bytes
        What was compared so far.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        self._definition = definition
        self._backend: Any = None
        self.documents = self.text_bytes = 0

    def compare(self, text: str, ids: npt.NDArray[Any], place: str) -> None:
        """Compare the ids of one document.

        Raises
        ------
        DataError
            They differ.
        """
        if self._definition.kind != "json":
            return
        self.open()
        reference = self._backend.encode(text, add_special_tokens=False)
        self.documents += 1
        self.text_bytes += len(text.encode())
        expected = np.asarray(reference.ids, np.int64)
        if np.array_equal(expected, ids):
            return
        shorter = min(expected.size, ids.size)
        differing = np.flatnonzero(expected[:shorter] != ids[:shorter])
        at = int(differing[0]) if differing.size else shorter
        start = reference.offsets[at][0] if at < expected.size else len(text)
        ours, theirs = (str(x[at]) if at < x.size else "none" for x in (ids, expected))
        raise DataError(
            f"a document of {place} is encoded otherwise than by Hugging Face's tokenizers: its "
            f"token {at:,} is {ours}, not {theirs}, near "
            f"{text[max(0, start - _AROUND) : start + _AROUND]!r}; use --engine huggingface, and "
            "please report the text."
        )

    def open(self) -> None:
        """Open the reference now; the first comparison does it otherwise."""
        if self._backend is None and self._definition.kind == "json":
            self._backend = open_reference(self._definition)
