"""SentencePiece models: opening, encoding, decoding, and the same as a tokenizer.json.

The ids are SentencePiece's own, with two additions. A literal end-of-document token in a text
becomes its id, or ordinary pieces, as ``literal_eod`` says and whatever the model's author made of
it: the piece is made user-defined for the one and a control symbol for the other, and SentencePiece
does the rest. And special pieces show when ids are decoded, as with Hugging Face's tokenizers.

A model that ``data.sentencepiece_training`` trained holds real spaces where others hold ▁ (U+2581).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import END_OF_TEXT, TokenizerDefinition
from phi1_megatron.data.engine import Encoded
from phi1_megatron.data.indexed import best_dtype
from phi1_megatron.errors import DataError

MODEL_FILE = "tokenizer.model"

SPACE = "\u2581"
"""What SentencePiece writes for a space, inside a model and while it encodes."""

# The types of pieces, as sentencepiece_model.proto numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2

_LONG_TEXT = 1 << 20  # characters; SentencePiece holds 30 bytes for each while it encodes
_SAFE_CUT = re.compile(rf"[^ {SPACE}](?= )")


def sentencepiece_definition(
    source: str | Path, eod_token: str | None = None
) -> TokenizerDefinition:
    """The definition in a SentencePiece ``.model``, or in a folder that holds tokenizer.model.

    The end-of-document token is ``eod_token``, else ``<|endoftext|>`` where the vocabulary has it,
    else the model's own end of sentence.

    Raises
    ------
    DataError
        There is no such file, it is not a SentencePiece model, or it has no such piece.
    """
    path = Path(source).expanduser()
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        why = f"holds no {MODEL_FILE}" if path.is_dir() else "is no file or folder here"
        raise DataError(f"tokenizer {source} {why}; give a SentencePiece .model.")
    file = file.resolve()
    name = file.parent.name if file.name == MODEL_FILE else file.stem
    try:
        return model_definition(file.read_bytes(), name, eod_token)
    except RuntimeError as error:  # the library's, for every bad file
        raise DataError(f"{file} is not a SentencePiece model that opens.") from error


def model_definition(
    content: bytes, name: str, eod_token: str | None = None
) -> TokenizerDefinition:
    """The definition of a model's bytes.

    Raises
    ------
    RuntimeError
        They are not a SentencePiece model.
    DataError
        It has no end-of-document token, or not ``eod_token``.
    """
    processor = _processor(content)
    token = eod_token or END_OF_TEXT
    eod_id = processor.piece_to_id(token)
    if eod_id == processor.unk_id():
        eod_id = -1 if eod_token else processor.eos_id()
        if eod_id < 0:
            raise DataError(
                f"tokenizer {name} has no end-of-document token: {token} is not in its "
                "vocabulary; name one that is."
            )
        token = processor.id_to_piece(eod_id)
    return TokenizerDefinition(
        kind="sentencepiece",
        content=content,
        name=name,
        vocab_size=processor.get_piece_size(),
        eod_token=token,
        eod_id=eod_id,
        fingerprint=hashlib.sha256(content).hexdigest(),
    )


class SentencePieceEngine:
    """Encodes in one thread, and decodes."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        self._dtype = best_dtype(definition.vocab_size)
        self._definition = definition
        proto = _proto(definition.content)
        wanted = _USER_DEFINED if definition.literal_eod == "eod" else _CONTROL
        proto.pieces[definition.eod_id].type = wanted
        self._processor = _processor(proto.SerializeToString())
        self._can_be_cut = _can_be_cut(proto)
        self._shown: Any = None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, joined; no end-of-document token is added."""
        parts: list[npt.NDArray[Any]] = []
        lengths = np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            for stretch in self._stretches(text):
                parts.append(np.array(self._processor.encode(stretch), self._dtype))
                lengths[number] += parts[-1].size
        ids = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        return Encoded(ids, lengths)

    def _stretches(self, text: str) -> Iterator[str]:
        """Parts of a long text that encode as the whole would, to save memory."""
        start = 0
        while self._can_be_cut and len(text) - start > _LONG_TEXT:
            cut = _SAFE_CUT.search(text, start + _LONG_TEXT)
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:] if start else text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; ids beyond the vocabulary have none."""
        if self._shown is None:
            # SentencePiece shows no control symbols, but does show what is user-defined.
            proto = _proto(self._definition.content)
            special = {self._definition.eod_id}
            for number, piece in enumerate(proto.pieces):
                if piece.type == _CONTROL:
                    special.add(number)
            for number in special:
                proto.pieces[number].type = _USER_DEFINED
            self._shown = _processor(proto.SerializeToString()), special
        processor, special = self._shown
        size = self._definition.vocab_size
        hidden = special if skip_special_tokens else set()
        return str(processor.decode([int(i) for i in ids if 0 <= i < size and i not in hidden]))


def as_tokenizer_json(definition: TokenizerDefinition) -> dict[str, Any] | None:
    """A ``tokenizer.json`` that gives the model's ids, or None where none can be relied upon.

    None for unigram models, whose sums of scores Hugging Face's library rounds otherwise, and for
    models that change a text before they encode it. A BPE's pieces become merges in the order of
    their scores. What is left is that SentencePiece takes the leftmost of two overlapping merges
    into one piece where Hugging Face takes the first in the list; :func:`telling_texts` has those.
    """
    proto = _proto(definition.content)
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    kinds = {piece.type for piece in proto.pieces}
    if (
        not _is_plain_bpe(proto)
        or _BYTE not in kinds
        or _UNUSED in kinds
        or len(set(scores.values())) < len(scores)
    ):
        return None
    escapes = proto.normalizer_spec.escape_whitespaces
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if escapes:
        decoders.insert(0, {"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
    merges = sorted(
        (-score, len(left), [left, right])
        for piece, score in scores.items()
        for left, right in _halves(piece, scores)
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": number != definition.eod_id,
                "special": number == definition.eod_id,
            }
            for number, piece in enumerate(proto.pieces)
            # No other control symbol: SentencePiece takes none from a text.
            if piece.type == _USER_DEFINED or number == definition.eod_id
        ],
        "normalizer": (
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE} if escapes else None
        ),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(proto.pieces)},
            "merges": [pair for _, _, pair in merges],
        },
    }


def telling_texts(definition: TokenizerDefinition) -> list[str]:
    """Texts that a tokenizer.json of the model may encode otherwise, to compare the two on.

    Those in which two merges into the same piece overlap, as in ``aa`` + ``aa`` + ``aa``; all
    pieces, one after the other, in both orders; and what the two libraries see differently.
    """
    proto = _proto(definition.content)
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    texts = {"".join(scores), "".join(reversed(scores))}
    for piece in scores:
        halves = list(_halves(piece, scores))
        rights = dict(halves)
        texts |= {left + right + rights[right] for left, right in halves if right in rights}
    if proto.normalizer_spec.escape_whitespaces:
        texts = {text.replace(SPACE, " ") for text in texts}
    return [
        *sorted(texts),
        "def f(x: int) -> str:\n    return f'{x!r}'  # ▁ ünïcödé 世界 🦆\n\n\n",
        "\tif a[0] == 'b':\r\n\t\t\tpass\n" + " " * 70 + "x = {**y}\t\t\n",
        "=====\n#####\n-----\naaaaaaa........ <0x41><unk></s> 1234567890\0\x7f",
        f"one{definition.eod_token}two {definition.eod_token} three",
        " leading,  double and trailing \n",
    ]


def _halves(piece: str, known: dict[str, float]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        if piece[:at] in known and piece[at:] in known:
            yield piece[:at], piece[at:]


def _is_plain_bpe(proto: Any) -> bool:
    """A BPE that changes nothing in a text before it merges."""
    normalizer = proto.normalizer_spec
    return proto.trainer_spec.model_type == _BPE and not (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    )


def _can_be_cut(proto: Any) -> bool:
    """Whether no piece reaches across the beginning of a space after something else.

    Then what comes before it and what comes after are merged independently.
    """
    across = re.compile(rf"[^ {SPACE}][ {SPACE}]")
    return (
        _is_plain_bpe(proto)
        and any(piece.type == _BYTE for piece in proto.pieces)  # unknown neighbours would fuse
        and not any(across.search(piece.piece) for piece in proto.pieces)
    )


def _proto(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(content)


def _processor(content: bytes) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor
