"""Let a polite kill (SIGTERM) clean up the way Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminating_as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM ends the program by ``SystemExit(143)``, so files are tidied up.

    By default SIGTERM ends Python without running any ``finally``. Outside the main thread, where
    Python lets no one set signal handlers, this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
