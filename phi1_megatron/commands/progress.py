"""Progress on a terminal, and plain lines where there is none (a log file, a pipe)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0
"""Least time between two plain lines."""

Show = Callable[[int, int, str], None]
"""Called with (work done, work in all or 0 where unknown, what to say beside the bar)."""


@contextmanager
def progress_bar(
    console: Console, title: str, plain_seconds: float = PLAIN_SECONDS
) -> Iterator[Show]:
    """Show how far ``title`` has come: a bar on a terminal, else a line now and then.

    A line is at most 80 columns wide if what is said beside the bar is at most 34.
    """
    if not console.is_terminal:
        yield _plain(console, title, plain_seconds)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[beside]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, beside="")

        def show(done: int, total: int, beside: str) -> None:
            bar.update(task, completed=done, total=total or None, beside=beside)

        yield show


def _plain(console: Console, title: str, plain_seconds: float) -> Show:
    said = time.monotonic()

    def show(done: int, total: int, beside: str) -> None:
        nonlocal said
        if time.monotonic() - said < plain_seconds:
            return
        said = time.monotonic()
        share = f"{done / total:4.0%}  " if total else ""
        console.print(f"{title}: {share}{beside}", highlight=False)

    return show
