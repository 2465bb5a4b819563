"""``phi1 export``: a checkpoint as a Hugging Face folder, proved by its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def export(
    source: Path,
    target: Path,
    *,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    tokenizer: Path | None = None,
    verify: bool = True,
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads.

    The logits of both forms are compared on fixed prompts before the folder gets its name; where
    they differ, nothing is written and the exit code is 1.

    Parameters
    ----------
    source
        A run folder (its newest whole checkpoint is taken) or one checkpoint.
    target
        The folder to make.
    dtype
        Type of the weights; by default the checkpoint's own.
    tokenizer
        Folder of the tokenizer; by default the one that the run's configuration names.
    verify
        Compare the logits of both forms.
    force
        Replace an earlier export.
    """
    from rich.console import Console

    from phi1_megatron.checkpoint.convert import DTYPES
    from phi1_megatron.checkpoint.export import export_checkpoint

    console = Console(soft_wrap=True, highlight=False)
    with weights_progress("Exporting") as on_progress:
        made = export_checkpoint(
            source,
            target,
            dtype=DTYPES[dtype] if dtype else None,
            tokenizer=tokenizer,
            verify=verify,
            force=force,
            on_progress=on_progress,
        )
    size = f"{made.num_bytes / 1e6:,.1f} MB of weights"
    console.print(f"Exported {made.checkpoint} ({size})", markup=False)
    if made.comparison is None:
        console.print("Logits were not compared (--no-verify).")
    else:
        console.print(
            f"Logits equal transformers': largest difference "
            f"{made.comparison.max_abs_difference:.2e} "
            f"({made.comparison.max_rel_difference:.1e} of the largest logit) "
            f"over {made.comparison.num_tokens} tokens"
        )
    console.print(f"It lies in {made.target}", markup=False)


@contextlib.contextmanager
def weights_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, shown from the first call (bytes done, bytes in all) on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, visible=False)
        yield lambda done, total: progress.update(
            task,
            completed=done,
            total=total,
            visible=True,
            description=title if done < total else "Comparing logits",
        )
