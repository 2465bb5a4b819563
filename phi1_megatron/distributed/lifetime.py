"""How long a process may live."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when the one that started it dies, however it dies.

    Ranks that outlived their launcher would train on unseen and hold the run folder; workers that
    outlived a run would write beside the next.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
