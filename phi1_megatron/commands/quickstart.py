"""``phi1 quickstart``: the whole path on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def quickstart(
    *overrides: str,
    folder: Path = Path("runs/quickstart"),
    recipe: Path | None = None,
    tokenizer: Path | None = None,
    fresh: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """From source code to a trained phi-1 and its completions, on this machine, in minutes.

    Takes the Python standard library as corpus, trains a tokenizer and a small phi-1 in two
    processes with tensor and sequence parallelism, exports it to Hugging Face and generates. Run
    again, it goes on where it ended.

    Parameters
    ----------
    overrides
        section.field=value, laid over the recipe; for example training.train_steps=50.
    folder
        Where everything is put.
    recipe
        The training recipe; examples/recipes/phi1_tiny_cpu.toml by default.
    tokenizer
        A Hugging Face tokenizer's folder to use instead of training one.
    fresh
        Remove what an earlier quickstart left in the folder.
    """
    from phi1_megatron.quickstart import RECIPE, run_quickstart

    run_quickstart(folder, recipe or RECIPE, tokenizer, overrides, fresh)
