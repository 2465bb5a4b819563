"""``phi1 convert``: checkpoints between this system's form and others'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from phi1_megatron.commands.export import export


def convert(
    source: Path,
    target: Path,
    *,
    to: Literal["huggingface"],
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    tokenizer: Path | None = None,
    verify: bool = True,
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Convert a checkpoint; ``--to huggingface`` is what ``phi1 export`` does.

    Parameters
    ----------
    source
        A run folder (its newest whole checkpoint is taken) or one checkpoint.
    target
        The folder to make.
    to
        The form to make.
    dtype
        Type of the weights; by default the checkpoint's own.
    tokenizer
        Folder of the tokenizer; by default the one that the run's configuration names.
    verify
        Compare the logits of both forms.
    force
        Replace an earlier export.
    """
    export(source, target, dtype=dtype, tokenizer=tokenizer, verify=verify, force=force)
