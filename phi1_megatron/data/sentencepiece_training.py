"""Training SentencePiece models of code: every text comes back from its ids, byte for byte.

SentencePiece writes a space as ▁ (U+2581) inside a model, and so cannot tell one from the other in
a text. The trained model is therefore given real spaces for its ▁, and told to leave those of a
text alone. The pieces and the ids stay as trained, and a literal ▁ is spelled in bytes, like any
character that the vocabulary lacks.

The vocabulary begins with <unk>, which nothing gives, ``<|endoftext|>``, CodeGen's 38 whitespace
runs and the 256 bytes. Digits stay single, as in Llama's tokenizer. Line ends may be part of a
piece, after ``):`` say.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

from phi1_megatron.data.definition import END_OF_TEXT, WHITESPACE_RUNS, TokenizerDefinition
from phi1_megatron.data.sentencepiece_model import SPACE, model_definition
from phi1_megatron.errors import DataError, UsageError

SentencePieceType: TypeAlias = Literal["bpe", "unigram"]

_CHUNK = 4096  # characters given to SentencePiece at a time
_SAMPLE_CHARACTERS = 64 << 20
_THREADS = 4  # not as many as there are cores: unigram's sums depend on the number

# SentencePiece would take ▁ for a space and skip what holds its reserved ▅; the end token is no
# text. So texts are cut there.
_NOT_LEARNED = re.compile(rf"[{SPACE}\u2585]|{re.escape(END_OF_TEXT)}")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: SentencePieceType = "bpe",
    name: str = "SentencePiece",
    on_progress: Callable[[int, int], None] | None = None,
    sample_characters: int = _SAMPLE_CHARACTERS,
) -> TokenizerDefinition:
    """Train a SentencePiece model with CodeGen's whitespace runs and ``<|endoftext|>``.

    The same texts give the same model, on any number of cores. ``texts`` is read once, and an even
    sample of it is held. A corpus too small for ``vocab_size`` gives a smaller vocabulary; look at
    the result's.

    Parameters
    ----------
    texts
        The documents.
    vocab_size
        Total size; at least 296 and the number of the corpus's characters.
    model_type
        SentencePiece's algorithm.
    on_progress
        Called with (characters read, documents read); training follows the reading.
    sample_characters
        How much text is learned from, at most.

    Raises
    ------
    UsageError
        ``vocab_size`` is too small.
    DataError
        There is no text, or SentencePiece cannot learn from it.
    """
    import sentencepiece

    sample = _sample(_chunks(texts, on_progress), sample_characters)
    if not sample:
        raise DataError("a tokenizer cannot be trained: the input holds no text.")
    model = io.BytesIO()
    sample.reverse()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_drain(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            user_defined_symbols=[run.replace(" ", SPACE) for run in WHITESPACE_RUNS],
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=8 * _CHUNK,  # bytes; a character has up to four
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed is not None:
            raise UsageError(
                f"a vocabulary of {vocab_size} cannot be trained: 256 bytes, "
                f"{len(WHITESPACE_RUNS)} whitespace runs, 2 special tokens and the corpus's "
                f"characters already need {needed[1]}."
            ) from error
        raise DataError(f"SentencePiece cannot learn from this input: {error}") from error
    return model_definition(_with_real_spaces(model.getvalue()), name, END_OF_TEXT)


def _with_real_spaces(content: bytes) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        piece.piece = piece.piece.replace(SPACE, " ")
    symbols = proto.trainer_spec.user_defined_symbols
    symbols[:] = [symbol.replace(SPACE, " ") for symbol in symbols]
    serialized = proto.SerializeToString(deterministic=True)
    assert isinstance(serialized, bytes)
    return serialized


def _chunks(texts: Iterable[str], on_progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """The texts in pieces that SentencePiece does not pass over as too long."""
    characters = 0
    for documents, text in enumerate(texts, 1):
        for part in _NOT_LEARNED.split(text):
            start = 0
            while start < len(part):
                end = _chunk_end(part, start)
                if not part[start:end].isspace():
                    yield part[start:end]
                start = end
        characters += len(text)
        if on_progress is not None:
            on_progress(characters, documents)


def _chunk_end(text: str, start: int) -> int:
    end = start + _CHUNK
    if end >= len(text):
        return len(text)
    # Before the mark, not after: SentencePiece drops line ends at the end of what it is given.
    for mark in ("\n", " "):
        at = text.rfind(mark, start + 1, end)
        if at > 0:
            return at
    return end


def _sample(chunks: Iterable[str], limit: int) -> list[str]:
    """Every chunk, or every second, fourth ... where they would exceed ``limit`` characters."""
    kept: list[str] = []
    held, stride = 0, 1
    for number, chunk in enumerate(chunks):
        if number % stride:
            continue
        kept.append(chunk)
        held += len(chunk)
        while held > limit and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            held = sum(map(len, kept))
    return kept


def _drain(sample: list[str]) -> Iterator[str]:
    """The sample from its end, which it loses: SentencePiece keeps a copy."""
    while sample:
        yield sample.pop()
