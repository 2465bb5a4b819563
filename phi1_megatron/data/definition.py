"""What a tokenizer is, apart from any library that runs it.

A definition is the text of a ``tokenizer.json`` or the bytes of a SentencePiece model, with the few
facts that a data set's report keeps. Reading one costs milliseconds and loads no tokenizer library,
so that preprocessing can start its workers at once; ``data.engine`` turns a definition into ids,
``data.tokenizer.Tokenizer`` into a tokenizer that also decodes and saves.

CodeGen's vocabulary is GPT-2's (ids 0 to 50256, ``<|endoftext|>`` last) followed by 38 added tokens
for runs of whitespace: 31 down to 2 spaces (50257 to 50286), then 9 down to 2 tabs (50287 to
50294). They match leftmost-longest, before GPT-2's regular expression sees the text.

A literal ``<|endoftext|>`` inside a text becomes the end-of-document id by default, as in
Megatron-LM and Hugging Face. The safer reading for a *document* would be plain text, so that a
source file that merely mentions the token does not end there; but corpora that join documents with
that very string count on the id, and the same command should give Megatron-LM's bytes. So the
default follows Megatron-LM, ``literal_eod="text"`` chooses the other, and preprocessing counts and
reports the documents concerned: the choice is never silent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from phi1_megatron.errors import DataError

END_OF_TEXT = "<|endoftext|>"
WHITESPACE_RUNS: tuple[str, ...] = tuple(" " * n for n in range(31, 1, -1)) + tuple(
    "\t" * n for n in range(9, 1, -1)
)
GPT2_VOCAB_SIZE = 50257

LiteralEod: TypeAlias = Literal["eod", "text"]

# Tried in this order where neither the caller nor tokenizer_config.json names the token.
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


@dataclass(frozen=True, slots=True)
class TokenizerDefinition:
    """Everything that decides a tokenizer's ids.

    Attributes
    ----------
    kind
        ``"json"``: ``content`` is a Hugging Face ``tokenizer.json``; ``"sentencepiece"``: a
        SentencePiece ``.model``.
    content
        The file, whole.
    name
        What to call it in reports (``CodeGenTokenizer``, a folder's name ...).
    vocab_size
        Highest id + 1, added tokens included; what a model's embedding must hold.
    eod_id
        Id of the end-of-document token ``eod_token``.
    fingerprint
        SHA-256 of the content in canonical form: equal fingerprints, equal ids.
    literal_eod
        What a literal special token in a text becomes: ``"eod"``, its id, or ``"text"``, the ids
        of its characters.
    """

    kind: Literal["json", "sentencepiece"]
    content: bytes
    name: str
    vocab_size: int
    eod_token: str
    eod_id: int
    fingerprint: str
    literal_eod: LiteralEod = "eod"


def gpt2_definition(vocab_file: str | Path, merge_file: str | Path) -> TokenizerDefinition:
    """GPT-2's byte-level BPE from its ``vocab.json`` and ``merges.txt``.

    Raises
    ------
    DataError
        A file is missing or is not what its name says.
    """
    vocab, merges = _read_bpe(vocab_file, merge_file)
    added = [_added(vocab.get(END_OF_TEXT, len(vocab)), END_OF_TEXT, special=True)]
    return from_json(_byte_level(vocab, merges, added), "GPT2BPETokenizer", END_OF_TEXT)


def codegen_definition(vocab_file: str | Path, merge_file: str | Path) -> TokenizerDefinition:
    """phi-1's tokenizer: GPT-2's BPE and the 38 whitespace runs; 50,295 ids.

    Raises
    ------
    DataError
        A file is missing, or the vocabulary is not GPT-2's size.
    """
    vocab, merges = _read_bpe(vocab_file, merge_file)
    if len(vocab) != GPT2_VOCAB_SIZE or END_OF_TEXT not in vocab:
        raise DataError(
            f"{vocab_file} holds {len(vocab):,} entries, but CodeGen's tokenizer starts from "
            f"GPT-2's {GPT2_VOCAB_SIZE:,}; give GPT-2's vocab.json and merges.txt."
        )
    added = [_added(vocab[END_OF_TEXT], END_OF_TEXT, special=True)]
    added += [_added(GPT2_VOCAB_SIZE + i, run) for i, run in enumerate(WHITESPACE_RUNS)]
    return from_json(_byte_level(vocab, merges, added), "CodeGenTokenizer", END_OF_TEXT)


def load_definition(source: str | Path, eod_token: str | None = None) -> TokenizerDefinition:
    """The definition in a folder that holds ``tokenizer.json``, or in such a file.

    The end-of-document token is ``eod_token``, else the ``eos_token`` of the
    ``tokenizer_config.json`` beside the file, else ``<|endoftext|>`` or a usual equivalent.

    Raises
    ------
    DataError
        There is no such file, it is not a tokenizer, or it has no end-of-document token.
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
        content = msgspec.json.decode(file.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a tokenizer.json that opens: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{file} is not a tokenizer.json that opens: it has no model.")
    config = file.with_name("tokenizer_config.json")
    if eod_token is None and config.is_file():
        eod_token = _eos_token(config)
    return from_json(content, file.resolve().parent.name, eod_token)


def from_json(
    content: Mapping[str, Any], name: str, eod_token: str | None = None
) -> TokenizerDefinition:
    """The definition of a parsed ``tokenizer.json``.

    Raises
    ------
    DataError
        None of the usual end-of-document tokens, or not ``eod_token``, is in its vocabulary.
    """
    # A tokenizer.json may carry its model's truncation; a corpus must not be cut by it.
    content = {**content, "truncation": None, "padding": None}
    ids = _vocabulary(content)
    candidates = END_TOKENS if eod_token is None else (eod_token,)
    found = next((token for token in candidates if token in ids), None)
    if found is None:
        raise DataError(
            f"tokenizer {name} has no end-of-document token: none of {', '.join(candidates)} is in "
            "its vocabulary; name one that is."
        )
    canonical = msgspec.json.encode(content, order="sorted")
    return TokenizerDefinition(
        kind="json",
        content=canonical,
        name=name,
        vocab_size=max(ids.values()) + 1,
        eod_token=found,
        eod_id=ids[found],
        fingerprint=hashlib.sha256(canonical).hexdigest(),
    )


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    vocab = content["model"].get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [token, score] pairs, their places the ids
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return {**vocab, **added}


def _read_bpe(
    vocab_file: str | Path, merge_file: str | Path
) -> tuple[dict[str, int], list[list[str]]]:
    for file in (vocab_file, merge_file):
        if not Path(file).is_file():
            raise DataError(f"{file} does not exist; a BPE needs its vocab.json and merges.txt.")
    try:
        vocab = msgspec.json.decode(Path(vocab_file).read_bytes(), type=dict[str, int])
        lines = Path(merge_file).read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        # One pass names a pair of files that do not belong together; tokenizers would do so late.
        for pair in merges:
            left, right = pair
            if left + right not in vocab or left not in vocab or right not in vocab:
                raise ValueError(f"the merge {left!r} + {right!r} leads out of the vocabulary")
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"{vocab_file} and {merge_file} are not a BPE: {error}") from error
    return vocab, merges


def _byte_level(
    vocab: Mapping[str, int], merges: Iterable[list[str]], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """A tokenizer.json, field for field what ``tokenizers`` writes for GPT-2's pipeline."""

    def step(add_prefix_space: bool, trim_offsets: bool) -> dict[str, Any]:
        return {
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": trim_offsets,
            "use_regex": True,
        }

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": step(add_prefix_space=False, trim_offsets=True),
        "post_processor": step(add_prefix_space=True, trim_offsets=False),
        "decoder": step(add_prefix_space=True, trim_offsets=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


def _added(token_id: int, content: str, special: bool = False) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _eos_token(config: Path) -> str | None:
    """``eos_token`` of a tokenizer_config.json, which is a string or an added token's object."""
    try:
        content = msgspec.json.decode(config.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    token = content.get("eos_token") if isinstance(content, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
