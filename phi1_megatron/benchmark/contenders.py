"""The ways from JSONL to ``.bin`` and ``.idx`` that are measured side by side.

Each is a command that takes ``--input`` and ``--output-prefix`` and writes
``{prefix}_text_document.bin`` and ``.idx``. Megatron-LM's are its own files in the user's checkout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from phi1_megatron.data.tokenizer import Tokenizer, codegen_tokenizer, gpt2_tokenizer
from phi1_megatron.errors import UsageError

TokenizerChoice: TypeAlias = Literal["gpt2", "codegen"]

_TYPES = {"gpt2": "GPT2BPETokenizer", "codegen": "CodeGenTokenizer"}
_THREADS = "RAYON_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to preprocess, with one tokenizer.

    Attributes
    ----------
    key
        Short and stable: names rows in JSON and files.
    slow
        It runs once, under light memory sampling; the others run several times without any, and
        once more for the memory.
    absent
        Why it cannot run at all, where that is known beforehand.
    """

    tokenizer: TokenizerChoice
    key: str
    name: str
    arguments: tuple[str, ...]
    slow: bool
    environment: dict[str, str] = field(default_factory=dict)
    absent: str | None = None

    def command(self, inputs: Sequence[Path], prefix: Path) -> list[str]:
        """The command line that preprocesses ``inputs``."""
        return [*self.arguments, "--input", *map(str, inputs), "--output-prefix", str(prefix)]


@dataclass(frozen=True, slots=True)
class MegatronLM:
    """A checkout of Megatron-LM, and an interpreter that has what its tools need."""

    folder: Path
    python: Path

    def __post_init__(self) -> None:
        if not (self.folder / "tools" / "preprocess_data.py").is_file():
            raise UsageError(
                f"{self.folder} holds no tools/preprocess_data.py: give --megatron-lm a checkout "
                "of Megatron-LM."
            )
        if not self.python.is_file():
            raise UsageError(f"{self.python} is no file: give --megatron-lm-python an interpreter.")


def build_tokenizer(choice: TokenizerChoice, vocab_file: Path, merge_file: Path) -> Tokenizer:
    """The tokenizer that ``choice`` names.

    Raises
    ------
    DataError
        A file is missing or is not what it should be.
    """
    build = codegen_tokenizer if choice == "codegen" else gpt2_tokenizer
    return build(vocab_file, merge_file)


def ours(choice: TokenizerChoice, vocab_file: Path, merge_file: Path, workers: int) -> Contender:
    """``phi1 preprocess`` with the tokenizer's own flags."""
    return Contender(
        tokenizer=choice,
        key="ours",
        name="phi1 preprocess",
        arguments=(
            *(sys.executable, "-m", "phi1_megatron", "preprocess"),
            *("--tokenizer-type", _TYPES[choice]),
            *("--vocab-file", str(vocab_file), "--merge-file", str(merge_file)),
            *("--append-eod", "--workers", str(workers)),
        ),
        slow=False,
        environment=_environment(),
    )


def contenders_beside_ours(
    choice: TokenizerChoice,
    folder: Path,
    eod_token: str,
    workers: int,
    megatron_lm: MegatronLM | None,
) -> list[Contender]:
    """What ours is measured against, with the same tokenizer as a Hugging Face ``folder``."""
    threads = {_THREADS: str(workers)}
    contenders = [
        Contender(
            tokenizer=choice,
            key="huggingface",
            name="HF tokenizers",
            arguments=(
                *(sys.executable, "-m", "phi1_megatron.benchmark.huggingface_baseline"),
                *("--tokenizer-model", str(folder / "tokenizer.json")),
                *("--eod-token", eod_token),
            ),
            slow=True,
            environment=_environment(**threads),
        )
    ]
    if megatron_lm is not None:
        flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
        tools = (
            ("megatron_lm", "Megatron-LM", "preprocess_data.py", ("--workers", str(workers)), True),
            (
                *("megatron_lm_fast", "Megatron-LM fast", "preprocess_data_fast.py"),
                *(("--use-gigatoken",), False),
            ),
        )
        for key, name, file, more, slow in tools:
            tool = megatron_lm.folder / "tools" / file
            contenders.append(
                Contender(
                    tokenizer=choice,
                    key=key,
                    name=name,
                    arguments=(
                        *(str(megatron_lm.python), str(tool), *flags),
                        *("--append-eod", *more),
                    ),
                    slow=slow,
                    environment=_environment(
                        PYTHONPATH=str(megatron_lm.folder),
                        HF_HUB_OFFLINE="1",
                        **({} if "--workers" in more else threads),
                    ),
                    absent=None if tool.is_file() else f"this checkout has no tools/{file}",
                )
            )
    return contenders


def _environment(**changes: str) -> dict[str, str]:
    """This process's, without what would hold a contender back."""
    held_back = {"TOKENIZERS_PARALLELISM", _THREADS}
    return {**{k: v for k, v in os.environ.items() if k not in held_back}, **changes}
