"""Tokenizers that encode, decode and save; what one *is* stands in ``data.definition``.

A :class:`Tokenizer` is a definition and the library that runs it: ``tokenizers`` for a
tokenizer.json, ``sentencepiece`` for a SentencePiece model. ``transformers`` is not needed, but the
folders that :meth:`Tokenizer.save` writes open with ``transformers.AutoTokenizer``.

Tokenizers trained here have the order of CodeGen's: byte-level BPE, ``<|endoftext|>``, and 38 runs
of whitespace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from phi1_megatron.data import definition as definitions
from phi1_megatron.data.definition import (
    END_OF_TEXT,
    WHITESPACE_RUNS,
    LiteralEod,
    TokenizerDefinition,
)
from phi1_megatron.data.engine import open_reference
from phi1_megatron.data.sentencepiece_model import (
    MODEL_FILE,
    SentencePieceEngine,
    as_tokenizer_json,
    sentencepiece_definition,
    telling_texts,
)
from phi1_megatron.errors import DataError, UsageError

__all__ = [
    "END_OF_TEXT",
    "SMALLEST_TRAINED_VOCAB",
    "WHITESPACE_RUNS",
    "LiteralEod",
    "Tokenizer",
    "codegen_tokenizer",
    "gpt2_tokenizer",
    "train_bpe",
]

SMALLEST_TRAINED_VOCAB = 256 + 1 + len(WHITESPACE_RUNS)
"""The 256 bytes, ``<|endoftext|>`` and the whitespace runs: a trained vocabulary's least size."""

_TRAINING_BATCH = 64


class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    definition
        What decides the ids. Name, size, end-of-document token and fingerprint are its.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        self.definition = definition
        self._pieces: SentencePieceEngine | None = None
        if definition.kind == "sentencepiece":
            self._pieces = SentencePieceEngine(definition)
        else:
            self._backend = open_reference(definition)

    @classmethod
    def load(cls, source: str | Path, eod_token: str | None = None) -> Tokenizer:
        """Open a folder that holds ``tokenizer.json``, or such a file; or a SentencePiece model.

        A SentencePiece model is a ``.model`` file, or the ``tokenizer.model`` of a folder without a
        tokenizer.json. The end-of-document token is ``eod_token``, else what the files say (see
        ``load_definition`` and ``sentencepiece_definition``).

        Raises
        ------
        DataError
            There is no such file, or it is not a tokenizer.
        """
        path = Path(source).expanduser()
        is_model = path.is_file() and path.suffix == ".model"
        holds_model = (path / MODEL_FILE).is_file() and not (path / "tokenizer.json").is_file()
        if is_model or holds_model:
            return cls(sentencepiece_definition(source, eod_token))
        return cls(definitions.load_definition(source, eod_token))

    @classmethod
    def from_json(
        cls, text: str, name: str, eod_token: str, literal_eod: LiteralEod = "eod"
    ) -> Tokenizer:
        """The inverse of :meth:`to_json`."""
        definition = definitions.from_json(json.loads(text), name, eod_token)
        return cls(replace(definition, literal_eod=literal_eod))

    def to_json(self) -> str:
        """The whole tokenizer as the text of a ``tokenizer.json``.

        Raises
        ------
        DataError
            It is a SentencePiece model for which there is none; see :meth:`save`.
        """
        if self.definition.kind == "json":
            return self.definition.content.decode()
        text = self._converted()
        if text is None:
            raise DataError(
                f"the SentencePiece model {self.name} has no tokenizer.json that surely gives the "
                "same ids; use the model itself."
            )
        return text

    def with_literal_eod(self, literal_eod: LiteralEod) -> Tokenizer:
        """A copy that reads literal special tokens in a text as asked for."""
        return Tokenizer(replace(self.definition, literal_eod=literal_eod))

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.definition.name

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included; what a model's embedding must hold."""
        return self.definition.vocab_size

    @property
    def eod_token(self) -> str:
        """The end-of-document token."""
        return self.definition.eod_token

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""
        return self.definition.eod_id

    @property
    def literal_eod(self) -> LiteralEod:
        """What a literal special token in a text becomes: ``"eod"``, its id, or ``"text"``."""
        return self.definition.literal_eod

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition: equal fingerprints, equal ids."""
        return self.definition.fingerprint

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no beginning or end token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in order.

        A tokenizer.json is run by several threads unless TOKENIZERS_PARALLELISM=false.
        """
        if self._pieces is not None:
            return [self._pieces.encode([text]).ids.tolist() for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``. Spaces are never "cleaned up": that corrupts code."""
        if self._pieces is not None:
            return self._pieces.decode(ids, skip_special_tokens)
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def save(self, folder: str | Path) -> Path:
        """Write a folder that ``Tokenizer.load`` and ``transformers.AutoTokenizer`` open alike.

        A SentencePiece model is written as tokenizer.model, and beside it the tokenizer.json that
        ``transformers`` opens where one is known to give the same ids: for BPE models that change
        no text before they encode it, as those trained here. Other folders hold tokenizer.model
        alone, which ``transformers`` may open or not. Where both are there, tokenizer.json is the
        one that is loaded: the same ids, another fingerprint.

        Each file appears by rename, and what an earlier tokenizer left there goes. Returns the
        folder.

        Raises
        ------
        DataError
            The folder cannot be written.
        """
        folder = Path(folder)
        files = self._files()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                if content is None:
                    (folder / name).unlink(missing_ok=True)
                    continue
                partial = folder / f"{name}.partial"
                try:
                    partial.write_bytes(content)
                    partial.replace(folder / name)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"the tokenizer could not be saved to {folder}: {error.strerror or error}."
            ) from error
        return folder

    def _files(self) -> dict[str, bytes | None]:
        """Contents of a saved folder; None for what must not be there."""
        is_model = self.definition.kind == "sentencepiece"
        text = self._converted() if is_model else self.to_json()
        special = {f"{role}_token": self.eod_token for role in ("bos", "eos", "unk")}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        companions: dict[str, dict[str, Any]] = {
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
        }
        return {
            MODEL_FILE: self.definition.content if is_model else None,
            "tokenizer.json": None if text is None else text.encode(),
            **{
                name: None if text is None else (json.dumps(content, indent=2) + "\n").encode()
                for name, content in companions.items()
            },
        }

    def _converted(self) -> str | None:
        """A SentencePiece model as a tokenizer.json that was seen to give the same ids."""
        content = as_tokenizer_json(self.definition)
        if content is None:
            return None
        text = json.dumps(content, ensure_ascii=False)
        other = Tokenizer.from_json(text, self.name, self.eod_token, self.literal_eod)
        sample = telling_texts(self.definition)
        same = other.encode_batch(sample) == self.encode_batch(sample)
        return text if same else None

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eod_id={self.eod_id})"


def gpt2_tokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its ``vocab.json`` and ``merges.txt``.

    Raises
    ------
    DataError
        A file is missing or is not what its name says.
    """
    return Tokenizer(definitions.gpt2_definition(vocab_file, merges_file))


def codegen_tokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """phi-1's tokenizer: GPT-2's BPE and the 38 whitespace runs; 50,295 ids.

    Raises
    ------
    DataError
        A file is missing, or the vocabulary is not GPT-2's size.
    """
    return Tokenizer(definitions.codegen_definition(vocab_file, merges_file))


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    name: str = "byte-level BPE",
    on_progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """Train a byte-level BPE with CodeGen's whitespace runs and ``<|endoftext|>``.

    The same texts give the same tokenizer, on any number of cores. ``texts`` is read once and not
    held. A corpus too small for ``vocab_size`` gives a smaller vocabulary; look at the result's.

    Parameters
    ----------
    texts
        The documents.
    vocab_size
        Total size, added tokens included; at least 295.
    on_progress
        Called with (characters read, documents read); merging follows the reading.

    Raises
    ------
    UsageError
        ``vocab_size`` is too small.
    DataError
        There is no text.
    """
    if vocab_size < SMALLEST_TRAINED_VOCAB:
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot be trained: 256 bytes, {END_OF_TEXT} and "
            f"{len(WHITESPACE_RUNS)} whitespace runs already need {SMALLEST_TRAINED_VOCAB}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Encoding takes the added tokens out before the BPE sees the text, so training must too:
    # otherwise merges are spent on indentation that can never be used.
    taken_out = Regex(r" {2,31}|\t{2,9}|<\|endoftext\|>")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(taken_out, "removed"), byte_level]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(WHITESPACE_RUNS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counter = [0, 0]
    backend.train_from_iterator(_counted_batches(texts, counter, on_progress), trainer)
    if counter[0] == 0:
        raise DataError("a tokenizer cannot be trained: the input holds no text.")
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    backend.add_tokens([AddedToken(run, special=False, normalized=True) for run in WHITESPACE_RUNS])
    return Tokenizer.from_json(backend.to_str(), name, END_OF_TEXT)


def _counted_batches(
    texts: Iterable[str], counter: list[int], on_progress: Callable[[int, int], None] | None
) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        counter[0] += len(text)
        counter[1] += 1
        if len(batch) == _TRAINING_BATCH:
            yield batch
            batch = []
            if on_progress is not None:
                on_progress(counter[0], counter[1])
    if batch:
        yield batch
    if on_progress is not None:
        on_progress(counter[0], counter[1])
