"""Text to ids, as fast as can be, behind one small interface.

Three engines, chosen by evidence: the marked form of CodeGen's tokenizer
over fastokens, plain fastokens, and Hugging Face's tokenizers, which is the reference and what
remains where fastokens does not know a tokenizer. ``sample_check`` compares them in every run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from phi1_megatron.data import marked_codegen
from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.indexed import best_dtype
from phi1_megatron.data.marked_codegen import MarkedForm
from phi1_megatron.errors import DataError

EngineChoice: TypeAlias = Literal["auto", "fastokens", "huggingface"]


class Encoded(NamedTuple):
    """Ids of several texts, joined."""

    ids: npt.NDArray[Any]  # [tokens], indexed.best_dtype(vocab_size)
    lengths: npt.NDArray[np.int64]  # [texts], tokens of each


class Engine(Protocol):
    """What encodes."""

    name: str
    """Library and version, as reports name it: ``fastokens 0.3.5``."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined; no end-of-document token is added."""
        ...


def open_engine(definition: TokenizerDefinition, choice: EngineChoice = "auto") -> Engine:
    """The engine for a tokenizer; it runs in the calling thread alone.

    Raises
    ------
    DataError
        ``choice`` is "fastokens", and it does not know this tokenizer; or no library does.
    """
    if definition.kind == "sentencepiece":
        from phi1_megatron.data.sentencepiece_model import SentencePieceEngine

        return SentencePieceEngine(definition)
    if choice == "huggingface":
        return HuggingFaceEngine(definition)
    try:
        if choice == "auto" and definition.literal_eod == "eod":
            form = marked_codegen.derive(msgspec.json.decode(definition.content))
            if form is not None:
                return MarkedCodeGenEngine(definition, form)
        return FastokensEngine(definition)
    except Exception as error:  # the library raises ValueError and, on odd files, panics
        if choice == "fastokens":
            raise DataError(
                f"fastokens does not know the tokenizer {definition.name}: {error}; choose "
                "--engine auto or huggingface."
            ) from error
        return HuggingFaceEngine(definition)


class FastokensEngine:
    """fastokens, as the tokenizer.json says."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        content = msgspec.json.decode(definition.content)
        self.name, self._backend = _open_fastokens(content)
        self._dtype = best_dtype(definition.vocab_size)
        self._split_special = definition.literal_eod == "text"

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        ids, offsets = _flat(self._backend, list(texts), self._split_special)
        return Encoded(ids.astype(self._dtype), np.diff(offsets))


class MarkedCodeGenEngine:
    """CodeGen's tokenizer in its marked form; see ``marked_codegen``."""

    def __init__(self, definition: TokenizerDefinition, form: MarkedForm) -> None:
        library, self._backend = _open_fastokens(form.content)
        self.name = f"{library}, marked"
        self._definition = definition
        self._form = replace(form, content={})  # megabytes, and in the backend now
        self._dtype = best_dtype(definition.vocab_size)
        self._plain: FastokensEngine | None = None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        if not texts:
            return Encoded(np.empty(0, self._dtype), np.empty(0, np.int64))
        marked = self._form.mark(texts)
        if marked is None:
            return self._one_by_one(texts)
        ids, offsets = _flat(self._backend, marked, split_special=False)
        return Encoded(*self._form.gather(ids.astype(self._dtype), offsets))

    def _one_by_one(self, texts: Sequence[str]) -> Encoded:
        """A batch in which some texts must be encoded the plain way."""
        if self._plain is None:
            self._plain = FastokensEngine(self._definition)  # few runs need it
        parts = [
            (self if self._form.takes(text) else self._plain).encode([text]).ids for text in texts
        ]
        return Encoded(np.concatenate(parts), np.asarray([part.size for part in parts], np.int64))


class HuggingFaceEngine:
    """Hugging Face's tokenizers: the reference."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        try:
            self._backend = tokenizers.Tokenizer.from_str(definition.content.decode())
        except Exception as error:  # the library raises bare Exception for every bad file
            raise DataError(f"the tokenizer {definition.name} does not open: {error}.") from error
        self._backend.encode_special_tokens = definition.literal_eod == "text"
        self._dtype = best_dtype(definition.vocab_size)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        # One text a call keeps the library to the calling thread.
        found = [
            self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            for text in texts
        ]
        ids = np.asarray([token for of_text in found for token in of_text], self._dtype)
        return Encoded(ids, np.asarray([len(of_text) for of_text in found], np.int64))


def _open_fastokens(content: dict[str, Any]) -> tuple[str, Any]:
    # Without these its "one thread" is a second one beside the caller's, with its own memory.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")

    import fastokens

    model = content["model"]
    pairs = model.get("merges")
    if pairs and not any(isinstance(p, str) or " " in p[0] or " " in p[1] for p in pairs):
        # The older spelling of merges, which opens a quarter faster.
        content = {**content, "model": {**model, "merges": [" ".join(pair) for pair in pairs]}}
    backend = fastokens.Tokenizer.from_json_str(msgspec.json.encode(content).decode())
    return f"fastokens {version('fastokens')}", backend


def _flat(
    backend: Any, texts: list[str], split_special: bool
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    ids, offsets = backend.encode_batch_flat(texts, False, split_special)
    return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
