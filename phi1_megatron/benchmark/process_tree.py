"""A command run as a whole: its time from start to exit, and the memory of it and its children.

The command leads a session of its own, so that everything it starts can be ended with it. Its
memory is what ``/proc`` says of the command and all below it, added up at one moment:

- PSS divides each shared page among the processes that map it, so the sum counts it once. It is
  the honest figure, and the kernel walks page tables for it: it is read rarely.
- RSS counts shared pages once in every process. It is cheap, and read often.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")
TICK_SECONDS = 0.25
"""Time between two calls of ``on_tick``."""

_RSS_SECONDS = 0.02
_PSS_SECONDS = 0.05
_PATIENCE_SECONDS = 3.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The most that a command and all below it held at one moment.

    Attributes
    ----------
    pss_bytes
        None where the kernel does not let this user read it.
    rss_bytes
        Counts a page that is shared once for each process that maps it.
    cost_seconds
        What looking cost: processor time of the process that looked.
    """

    pss_bytes: int | None
    rss_bytes: int
    cost_seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended.

    Attributes
    ----------
    seconds
        From before its start to after its exit.
    processor_seconds
        What it and all it waited for took, user and system: other work on the machine adds less to
        this than to ``seconds``.
    exit_code
        Negative where a signal ended it; None where it was killed for taking too long.
    memory
        None where it was not asked for.
    """

    seconds: float
    processor_seconds: float
    exit_code: int | None
    memory: PeakMemory | None


def run_tree(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    stderr: Path,
    timeout_seconds: float,
    sampling_share: float = 0.0,
    on_tick: Callable[[float], None] | None = None,
) -> Finished:
    """Run a command and leave nothing of it running, whatever happens here.

    Parameters
    ----------
    stderr
        A file that takes what the command says there; its standard output is dropped.
    timeout_seconds
        The command and all it started are killed when this is over.
    sampling_share
        How much of one core looking at the memory may take: 0.01 slows nothing that can be
        noticed; 0 measures no memory at all.
    on_tick
        Called with the seconds since the start, now and then.

    Raises
    ------
    OSError
        The command cannot be started.
    """
    used_before = _children_seconds()
    with stderr.open("wb") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    ended = threading.Event()
    ended_at = started

    def await_exit() -> None:
        # Popen.wait(timeout=...) polls with naps of up to 50 ms; a thread sees the very moment.
        nonlocal ended_at
        process.wait()
        ended_at = time.perf_counter()
        ended.set()

    waiter = threading.Thread(target=await_exit, daemon=True)
    waiter.start()
    sampler = _Sampler(process.pid, sampling_share) if sampling_share > 0 else None
    timed_out = False
    try:
        next_tick = 0.0
        while not ended.wait(_RSS_SECONDS if sampler else TICK_SECONDS):
            elapsed = time.perf_counter() - started
            if sampler is not None:
                sampler.look()
            if elapsed > timeout_seconds:
                timed_out = True
                break
            if on_tick is not None and elapsed >= next_tick:
                next_tick = elapsed + TICK_SECONDS
                on_tick(elapsed)
    finally:
        end_session(process.pid)
        waiter.join()
    return Finished(
        seconds=ended_at - started,
        processor_seconds=_children_seconds() - used_before,
        exit_code=None if timed_out else process.returncode,
        memory=None if sampler is None else sampler.peak(),
    )


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def end_session(session: int) -> None:
    """End every process of a session: politely, so that files are tidied up, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        members = _members(session)
        for member in members:
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        patience = time.monotonic() + _PATIENCE_SECONDS
        while members and time.monotonic() < patience:
            time.sleep(0.02)
            members = _members(session)
        if not members:
            return


def _members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def tree_of(root: int) -> list[int]:
    """The process and all below it, parents before children."""
    found = [root]
    for process in found:  # grows as it is walked
        try:
            threads = list((PROC / str(process) / "task").iterdir())
        except OSError:
            continue  # it has ended
        for thread in threads:
            try:
                found.extend(map(int, (thread / "children").read_bytes().split()))
            except FileNotFoundError:
                if thread.is_dir():  # a kernel without CONFIG_PROC_CHILDREN
                    return _tree_by_parents(root)
            except OSError:
                continue
    return found


def _tree_by_parents(root: int) -> list[int]:
    try:
        below = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return [root]
    return [root, *(process.pid for process in below)]


class _Sampler:
    """Looks at the memory of a process tree, each time it is asked to and it is worth it."""

    def __init__(self, root: int, share: float) -> None:
        self._root = root
        self._share = share
        self._tree = [root]
        self._next_look = self._next_tree = self._next_pss = 0.0
        self._pss: int | None = None
        self._rss = 0
        self._cost = 0.0

    def look(self) -> None:
        now, spent = time.perf_counter(), time.thread_time()
        if now < self._next_look:
            return
        if now >= self._next_tree:
            self._tree = tree_of(self._root)
            self._next_tree = now + _PSS_SECONDS
        self._rss = max(self._rss, sum(map(_rss_bytes, self._tree)))
        took = time.perf_counter() - now
        self._next_look = now + took / self._share
        if now >= self._next_pss:
            read = [size for size in map(_pss_bytes, self._tree) if size is not None]
            if read:
                self._pss = max(self._pss or 0, sum(read))
            took = time.perf_counter() - now
            self._next_pss = now + max(_PSS_SECONDS, took / self._share)
        self._cost += time.thread_time() - spent

    def peak(self) -> PeakMemory:
        return PeakMemory(self._pss, self._rss, self._cost)


def _rss_bytes(process: int) -> int:
    try:
        return int((PROC / str(process) / "statm").read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0  # it has ended


def _pss_bytes(process: int) -> int | None:
    """None where the process has ended or is not ours to look into."""
    try:
        text = (PROC / str(process) / "smaps_rollup").read_bytes()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None
