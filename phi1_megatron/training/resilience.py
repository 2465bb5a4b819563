"""Ending well: a signal becomes a checkpoint, a failure becomes one readable file."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Has any rank been told to stop? SIGTERM, SIGINT and SIGUSR1 ask; a second SIGINT insists."""

    def __init__(self) -> None:
        self.asked_by: str | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within this context."""
        before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked_by == "SIGINT":
            raise KeyboardInterrupt
        self.asked_by = signal.Signals(number).name

    def agreed(self) -> bool:
        """The same answer on every rank: yes where any was asked. Costs one tiny all-reduce."""
        asked = torch.tensor([self.asked_by is not None], dtype=torch.float32)
        asked = asked.to(torch.cuda.current_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def record_failure(path: Path, rank: int, error: BaseException) -> bool:
    """Write the traceback to ``path`` unless another rank failed first; was it this one?

    What a rank raises after its peer has died is only a closed connection; the first file stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"rank {rank} failed first:\n\n" + "".join(traceback.format_exception(error))
    aside = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    try:
        os.link(aside, path)
        return True
    except FileExistsError:
        return False  # another rank was first, and its file is the one to read
    finally:
        aside.unlink()
