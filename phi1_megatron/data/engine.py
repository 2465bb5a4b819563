"""Text to ids, as fast as can be, behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from phi1_megatron.data.definition import TokenizerDefinition

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
    """The engine for a tokenizer."""
    raise NotImplementedError
