"""Byte-level BPE tokenizers: phi-1's own (CodeGen), GPT-2's, new ones, any tokenizer.json.

Everything runs on the ``tokenizers`` library; ``transformers`` is not needed to encode, but the
folders that :meth:`Tokenizer.save` writes open with ``transformers.AutoTokenizer``.

CodeGen's vocabulary is GPT-2's (ids 0 to 50256, ``<|endoftext|>`` last) followed by 38 added tokens
for runs of whitespace: 31 down to 2 spaces (50257 to 50286), then 9 down to 2 tabs (50287 to
50294). They match leftmost-longest, before GPT-2's regular expression sees the text. Tokenizers
trained here keep that order: byte-level BPE, ``<|endoftext|>``, 38 whitespace runs.

A literal ``<|endoftext|>`` inside a text becomes the end-of-document id by default, as in
Megatron-LM and Hugging Face. The safer reading for a *document* would be plain text, so that a
source file that merely mentions the token does not end there; but corpora that join documents with
that very string count on the id, and the same command should give Megatron-LM's bytes. So the
default follows Megatron-LM, ``with_literal_eod("text")`` chooses the other, and preprocessing
counts and reports the documents concerned: the choice is never silent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from phi1_megatron.errors import DataError, UsageError

END_OF_TEXT = "<|endoftext|>"
WHITESPACE_RUNS: tuple[str, ...] = tuple(" " * n for n in range(31, 1, -1)) + tuple(
    "\t" * n for n in range(9, 1, -1)
)
GPT2_VOCAB_SIZE = 50257
SMALLEST_TRAINED_VOCAB = 256 + 1 + len(WHITESPACE_RUNS)
"""The 256 bytes, ``<|endoftext|>`` and the whitespace runs: a trained vocabulary's least size."""

LiteralEod: TypeAlias = Literal["eod", "text"]

# Tried in this order where neither the caller nor tokenizer_config.json names the token.
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_TRAINING_BATCH = 64


class Tokenizer:
    """Text to token ids and back.

    Attributes
    ----------
    name
        What to call it in reports (``CodeGenTokenizer``, a folder's name ...).
    vocab_size
        Highest id + 1, added tokens included; what a model's embedding must hold.
    eod_id
        Id of the end-of-document token ``eod_token``.
    literal_eod
        What a literal special token in a text becomes: ``"eod"``, its id, or
        ``"text"``, the ids of its characters.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        eod_token: str | None = None,
        literal_eod: LiteralEod = "eod",
    ) -> None:
        candidates = _END_TOKENS if eod_token is None else (eod_token,)
        ids = ((token, backend.token_to_id(token)) for token in candidates)
        eod_token, eod_id = next(((t, i) for t, i in ids if i is not None), (None, None))
        if eod_token is None or eod_id is None:
            raise DataError(
                f"tokenizer {name} has no end-of-document token: none of "
                f"{', '.join(candidates)} is in its vocabulary; name one that is."
            )
        # A tokenizer.json may carry its model's truncation; a corpus must not be cut by it.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = literal_eod == "text"
        self._backend = backend
        self.name = name
        self.literal_eod: LiteralEod = literal_eod
        self.eod_token: str = eod_token
        self.eod_id: int = eod_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, source: str | Path, eod_token: str | None = None) -> Tokenizer:
        """Open a folder that holds ``tokenizer.json``, or such a file.

        The end-of-document token is ``eod_token``, else the ``eos_token`` of the
        ``tokenizer_config.json`` beside the file, else ``<|endoftext|>`` or a usual equivalent.

        Raises
        ------
        DataError
            There is no such file, or it is not a tokenizer.
        """
        path = Path(source).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            why = "holds no tokenizer.json" if path.is_dir() else "is no file or folder here"
            raise DataError(
                f"tokenizer {source} {why}; give a folder that holds tokenizer.json, or the file "
                "(a Hugging Face name is not looked up: download or save_pretrained it first)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every bad file
            raise DataError(f"{file} is not a tokenizer.json that opens: {error}") from error
        config = file.with_name("tokenizer_config.json")
        if eod_token is None and config.is_file():
            eod_token = _eos_token(config)
        return cls(backend, name=file.resolve().parent.name, eod_token=eod_token)

    @classmethod
    def from_json(
        cls, text: str, name: str, eod_token: str, literal_eod: LiteralEod = "eod"
    ) -> Tokenizer:
        """The inverse of :meth:`to_json`; how worker processes receive a tokenizer."""
        return cls(tokenizers.Tokenizer.from_str(text), name, eod_token, literal_eod)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a ``tokenizer.json``."""
        return str(self._backend.to_str())

    def with_literal_eod(self, literal_eod: LiteralEod) -> Tokenizer:
        """A copy that reads literal special tokens in a text as asked for."""
        return Tokenizer.from_json(self.to_json(), self.name, self.eod_token, literal_eod)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no beginning or end token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in order. Uses several threads unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``. Spaces are never "cleaned up": that corrupts code."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical tokenizer.json: equal fingerprints, equal ids."""
        canonical = json.dumps(
            json.loads(self.to_json()), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a folder that ``Tokenizer.load`` and ``transformers.AutoTokenizer`` open alike.

        Each file appears by rename. Returns the folder.

        Raises
        ------
        DataError
            The folder cannot be written.
        """
        folder = Path(folder)
        special = {f"{role}_token": self.eod_token for role in ("bos", "eos", "unk")}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (
                ("tokenizer.json", self.to_json()),
                ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
                ("special_tokens_map.json", json.dumps(special, indent=2) + "\n"),
            ):
                partial = folder / f"{name}.partial"
                try:
                    partial.write_text(text, encoding="utf-8")
                    partial.replace(folder / name)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"the tokenizer could not be saved to {folder}: {error.strerror or error}."
            ) from error
        return folder

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eod_id={self.eod_id})"


def gpt2_tokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its ``vocab.json`` and ``merges.txt``.

    Raises
    ------
    DataError
        A file is missing or is not what its name says.
    """
    backend = _byte_level(_bpe_from_files(vocab_file, merges_file))
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend, name="GPT2BPETokenizer", eod_token=END_OF_TEXT)


def codegen_tokenizer(vocab_file: str | Path, merges_file: str | Path) -> Tokenizer:
    """phi-1's tokenizer: GPT-2's BPE and the 38 whitespace runs; 50,295 ids.

    Raises
    ------
    DataError
        A file is missing, or the vocabulary is not GPT-2's size.
    """
    backend = _byte_level(_bpe_from_files(vocab_file, merges_file))
    if backend.get_vocab_size() != GPT2_VOCAB_SIZE:
        raise DataError(
            f"{vocab_file} holds {backend.get_vocab_size():,} entries, but CodeGen's tokenizer "
            f"starts from GPT-2's {GPT2_VOCAB_SIZE:,}; give GPT-2's vocab.json and merges.txt."
        )
    _add_codegen_tokens(backend)
    return Tokenizer(backend, name="CodeGenTokenizer", eod_token=END_OF_TEXT)


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
    backend = _byte_level(models.BPE())
    # Encoding takes the added tokens out before the BPE sees the text, so training must too:
    # otherwise merges are spent on indentation that can never be used.
    taken_out = Regex(r" {2,31}|\t{2,9}|<\|endoftext\|>")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(taken_out, "removed"), backend.pre_tokenizer]
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
    backend.pre_tokenizer = _pre_tokenizer()
    _add_codegen_tokens(backend)
    return Tokenizer(backend, name=name, eod_token=END_OF_TEXT)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _add_codegen_tokens(backend: tokenizers.Tokenizer) -> None:
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    backend.add_tokens([AddedToken(run, special=False, normalized=True) for run in WHITESPACE_RUNS])


def _bpe_from_files(vocab_file: str | Path, merges_file: str | Path) -> models.BPE:
    for file in (vocab_file, merges_file):
        if not Path(file).is_file():
            raise DataError(f"{file} does not exist; a BPE needs its vocab.json and merges.txt.")
    try:
        return models.BPE.from_file(str(vocab_file), str(merges_file))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise DataError(f"{vocab_file} and {merges_file} are not a BPE: {error}") from error


def _eos_token(config: Path) -> str | None:
    """``eos_token`` of a tokenizer_config.json, which is a string or an added token's object."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    token = content.get("eos_token") if isinstance(content, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


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
