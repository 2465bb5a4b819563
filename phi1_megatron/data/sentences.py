"""Documents into sentences, each a sequence of its own, as ``--split-sentences`` of Megatron-LM.

NLTK's Punkt decides where a sentence ends; a text is given to it in pieces of a million characters.
Its parameters are NLTK's own where they are installed, else they are learned from the corpus.
Whitespace between sentences and at the end of a text is dropped, and nothing else.

Punkt knows prose only. So blocks of code stay whole, each a sentence of its own, and so does a
document that is source code as a whole (``data.code_blocks`` says which are): its lines are no
sentences, and a period in it is not where anything ends. ``whole_code=False`` gives every document
to Punkt, which is Megatron-LM's way to the letter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import msgspec

from phi1_megatron.data.code_blocks import segments
from phi1_megatron.errors import DataError, UsageError

_PIECE_CHARACTERS = 1_000_000  # Megatron-LM's
_TRAINING_CHARACTERS = 10_000_000  # prose learned from; Punkt reads about half a million a second
_TRAINING_BATCH = 1_000_000  # Punkt holds a batch's words as objects, 100 bytes a character
_READ_AT_MOST = 20 * _TRAINING_CHARACTERS  # a corpus of code may hold little prose


class _Parameters(msgspec.Struct):
    """What Punkt knows of a language, in a form that is always the same for the same knowledge."""

    abbrev_types: list[str]
    collocations: list[tuple[str, str]]
    sent_starters: list[str]
    ortho_context: dict[str, int]


@dataclass(frozen=True)
class SentenceSplitter:
    """Splits texts; pickling it sends the parameters and the two flags only.

    Attributes
    ----------
    params
        Punkt's parameters, as :func:`installed_punkt` and :func:`train_punkt` give them.
    keep_newlines
        Leave line ends after the sentence that they follow instead of dropping them.
    whole_code
        Leave blocks of code, and source code, in one piece.
    """

    params: bytes
    keep_newlines: bool
    whole_code: bool

    @property
    def fingerprint(self) -> str:
        """Equal for splitters that split alike."""
        digest = hashlib.sha256(self.params).hexdigest()
        flags = "".join(
            f" {name}" for name in ("keep_newlines", "whole_code") if getattr(self, name)
        )
        return f"punkt {digest[:16]}{flags}"

    def split(self, text: str) -> list[str]:
        """The sentences of ``text``, none of them empty."""
        return [
            sentence
            for start in range(0, len(text), _PIECE_CHARACTERS)
            for sentence in self._split(text[start : start + _PIECE_CHARACTERS])
        ]

    def _split(self, piece: str) -> list[str]:
        if not self.whole_code:
            return self._sentences(piece)
        parts = segments(piece)
        if len(parts) == 1 and not parts[0].is_code:
            return self._sentences(piece)
        sentences: list[str] = []
        for start, end, is_code in parts:
            part = piece[start:end]
            text = part.rstrip()
            if is_code:
                found = [text]
            else:
                found = self._sentences(text if self.keep_newlines or not start else text.lstrip())
            sentences += found
            if self.keep_newlines and sentences:
                sentences[-1] += part[len(text) :]
        if sentences:
            sentences[-1] = sentences[-1].rstrip()
        return sentences

    def _sentences(self, prose: str) -> list[str]:
        sentences = self._punkt.tokenize(prose)
        assert isinstance(sentences, list)
        return sentences

    @cached_property
    def _punkt(self) -> Any:
        return _tokenizer(self.params, self.keep_newlines)

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def installed_punkt(lang: str) -> bytes | None:
    """Parameters that NLTK's data hold for a language, or None where they are not installed.

    Looks for ``punkt_tab`` and the older ``punkt``, and downloads nothing.

    Raises
    ------
    DataError
        NLTK is missing.
    UsageError
        ``lang`` is no language's name.
    """
    punkt = _nltk_punkt()
    import nltk.data

    try:
        return _encoded(punkt.PunktTokenizer(lang)._params)
    except ValueError as error:
        raise UsageError(
            f"{lang!r} is not the name of a Punkt model; --lang takes one like english or german."
        ) from error
    except LookupError:
        pass  # the older data may be there
    try:
        found = nltk.data.find(f"tokenizers/punkt/{lang}.pickle")
    except LookupError:
        return None
    with found.open() as stream:
        return _encoded(punkt.punkt_pickle_load(stream)._params)


def train_punkt(texts: Iterable[str]) -> bytes:
    """Parameters learned from the first ten million characters of prose in ``texts``.

    Code is passed over. The same texts give the same parameters.

    Raises
    ------
    DataError
        NLTK is missing, or there is no text.
    """
    trainer = _nltk_punkt().PunktTrainer(lang_vars=_language_vars(keep_newlines=False))
    for batch in _batches_of_prose(texts):
        trainer.train(batch, finalize=False)
    return _encoded(trainer.get_params())


def _batches_of_prose(texts: Iterable[str]) -> Iterator[str]:
    batch: list[str] = []
    held = learned = read = 0
    for text in texts:
        read += len(text)
        for start, end, is_code in segments(text[:_TRAINING_BATCH]):
            if not is_code:
                batch.append(text[start:end])
                held += end - start
        if held >= _TRAINING_BATCH:
            yield "\n\n".join(batch)
            batch, held, learned = [], 0, learned + held
        if learned + held >= _TRAINING_CHARACTERS or read >= _READ_AT_MOST:
            break
    if read == 0:
        raise DataError("Punkt cannot be trained to split sentences: the input holds no text.")
    if held:
        yield "\n\n".join(batch)


def _encoded(params: Any) -> bytes:
    parameters = _Parameters(
        abbrev_types=sorted(params.abbrev_types),
        collocations=sorted(params.collocations),
        sent_starters=sorted(params.sent_starters),
        ortho_context={
            word: flags for word, flags in sorted(params.ortho_context.items()) if flags
        },
    )
    return msgspec.json.encode(parameters)


def _tokenizer(params: bytes, keep_newlines: bool) -> Any:
    punkt = _nltk_punkt()
    known = msgspec.json.decode(params, type=_Parameters)
    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(known.abbrev_types)
    parameters.collocations = set(known.collocations)
    parameters.sent_starters = set(known.sent_starters)
    parameters.ortho_context = _Contexts(known.ortho_context)
    return punkt.PunktSentenceTokenizer(parameters, lang_vars=_language_vars(keep_newlines))


class _Contexts(dict[str, int]):
    """NLTK's own is a defaultdict, which a worker would fill with every word it ever meets."""

    def __missing__(self, word: str) -> int:
        return 0


def _language_vars(keep_newlines: bool) -> Any:
    class LanguageVars(_nltk_punkt().PunktLanguageVars):  # type: ignore[misc]
        if keep_newlines:
            # White space after the sentence's end is part of the match, so that the sentence keeps
            # it. As in Megatron-LM an end then needs none: "why?he" ends after "why?". Matching
            # from a word's beginning only, it takes linear time.
            _period_context_fmt = r"""
                (?<!\S)\S*
                %(SentEndChars)s\s*
                (?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"""

        def __init__(self) -> None:
            self._contexts = _unhurried(super().period_context_re())
            self._words = _unhurried(super()._word_tokenizer_re())

        def period_context_re(self) -> Any:
            return self._contexts

        def _word_tokenizer_re(self) -> Any:
            return self._words

    return LanguageVars()


def _unhurried(pattern: Any) -> Any:
    """The pattern without NLTK's limit of five seconds a text.

    A long list of short sentences takes longer, and would stop the whole run.
    """
    try:
        from nltk import redos
    except ImportError:
        return pattern  # NLTK before 3.10 has no such limit
    return redos.compile(pattern, timeout=None)


def _nltk_punkt() -> Any:
    try:
        import nltk.tokenize.punkt
    except ImportError as error:
        raise DataError(
            "NLTK, which splits sentences, is not installed; pip install nltk, or leave "
            "--split-sentences out."
        ) from error
    return nltk.tokenize.punkt
