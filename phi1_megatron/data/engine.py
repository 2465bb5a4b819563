"""Text to ids, as fast as can be, behind one small interface.

Three engines: the marked form of CodeGen's tokenizer over fastokens, plain fastokens, and Hugging
Face's tokenizers, which is the reference and what remains where fastokens does not know a
tokenizer. ``sample_check`` compares them in every run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from phi1_megatron.data import marked_codegen
from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.indexed import best_dtype
from phi1_megatron.data.marked_codegen import MarkedForm
from phi1_megatron.errors import DataError

if TYPE_CHECKING:
    import tokenizers

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
        if choice == "auto" and marked_codegen.may_be_marked(definition.content):
            form = marked_codegen.derive(msgspec.json.decode(definition.content))
            if form is not None:
                return MarkedCodeGenEngine(definition, form)
        return FastokensEngine(definition)
    except Exception as error:  # the library's constructor names no narrower class
        if choice == "fastokens":
            raise DataError(
                f"fastokens does not know the tokenizer {definition.name}: {error}; choose "
                "--engine auto or huggingface."
            ) from error
        return HuggingFaceEngine(definition)


class FastokensEngine:
    """fastokens, as the tokenizer.json says."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        self.name, self._backend = _open_fastokens(definition.content)
        self._dtype = best_dtype(definition.vocab_size)
        self._split_special = definition.literal_eod == "text"

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        ids, offsets = _flat(self._backend, list(texts), self._split_special)
        return Encoded(ids.astype(self._dtype), np.diff(offsets))


class MarkedCodeGenEngine:
    """CodeGen's tokenizer in its marked form; see ``marked_codegen``."""

    def __init__(self, definition: TokenizerDefinition, form: MarkedForm) -> None:
        library, self._backend = _open_fastokens(msgspec.json.encode(form.content))
        self.name = f"{library}, marked"
        self._definition = definition
        self._form = replace(form, content={})  # megabytes, and in the backend now
        self._dtype = best_dtype(definition.vocab_size)
        self._split_special = definition.literal_eod == "text"
        self._plain: FastokensEngine | None = None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        if not texts:
            return Encoded(np.empty(0, self._dtype), np.empty(0, np.int64))
        marked = self._form.mark(texts)
        if marked is None:
            return self._encode_either_way(texts)
        ids, offsets = _flat(self._backend, marked.texts, self._split_special)
        return Encoded(*self._form.gather(marked, ids.astype(self._dtype), offsets))

    def _encode_either_way(self, texts: Sequence[str]) -> Encoded:
        """Ids of a batch in which some texts must be encoded the plain way."""
        if self._plain is None:  # most runs never need its memory
            self._plain = FastokensEngine(self._definition)
        ways = [self._form.takes(text) for text in texts]
        engines: dict[bool, Engine] = {True: self, False: self._plain}
        parts = {}
        for way, engine in engines.items():
            encoded = engine.encode([text for text, w in zip(texts, ways, strict=True) if w == way])
            parts[way] = iter(np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]))
        ordered = [next(parts[way]) for way in ways]
        lengths = np.asarray([part.size for part in ordered], np.int64)
        return Encoded(np.concatenate(ordered), lengths)


class HuggingFaceEngine:
    """Hugging Face's tokenizers: the reference."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        # Read at the first batch: without it even a batch of one text starts a pool of threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._backend = open_reference(definition)
        self.name = f"tokenizers {version('tokenizers')}"
        self._dtype = best_dtype(definition.vocab_size)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined."""
        parts = [np.empty(0, self._dtype)]
        for text in texts:  # one a call: the library's results take 50 times the memory of ids
            encoding = self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
            parts.append(np.asarray(encoding.ids, self._dtype))
        lengths = np.asarray([part.size for part in parts[1:]], np.int64)
        return Encoded(np.concatenate(parts), lengths)


def open_reference(definition: TokenizerDefinition) -> tokenizers.Tokenizer:
    """Hugging Face's tokenizer of a definition, whose ids are right by definition.

    Raises
    ------
    DataError
        The library cannot load it.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(definition.content.decode())
    except Exception as error:  # the library raises bare Exception for every bad file
        raise DataError(f"the tokenizer {definition.name} does not open: {error}.") from error
    backend.encode_special_tokens = definition.literal_eod == "text"
    return backend


def _open_fastokens(content: bytes) -> tuple[str, Any]:
    # Without these its "one thread" is a second one beside the caller's, with its own memory.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    import fastokens

    backend = fastokens.Tokenizer.from_json_str(content.decode())
    return f"fastokens {version('fastokens')}", backend


def _flat(
    backend: Any, texts: list[str], split_special: bool
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    ids, offsets = backend.encode_batch_flat(texts, False, split_special)
    return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
