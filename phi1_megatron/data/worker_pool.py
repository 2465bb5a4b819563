"""Worker processes that do one job on a stream of items, in order, and are missed when they die.

``concurrent.futures`` notices a dead worker too, but cannot say which one died or what it was
working on; here every worker has a pipe of its own, so both are known at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from phi1_megatron.distributed.lifetime import end_with_parent
from phi1_megatron.errors import DataError, Phi1Error

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items a worker held back or under way at a time: bounds what waits for the slowest one's turn.
_AHEAD = 4
# Items sent to a worker before it has answered: it goes on while the parent is busy.
_QUEUED = 2


class WorkerPool(AbstractContextManager["WorkerPool[Result]"], Generic[Result]):
    """``workers`` processes that each call ``job`` on one item at a time.

    Where this process runs a single thread, workers are forked from it and find the job as it is,
    opened and warm; a fork of a process with more threads can hang, so there they are spawned, and
    ``job`` must survive pickling.
    """

    def __init__(self, job: Callable[[Any], Result], workers: int) -> None:
        fork = runs_one_thread()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._workers: dict[Connection[Any, Any], _Worker] = {}
        for number in range(1, workers + 1):
            ours, theirs = context.Pipe()
            # A forked worker inherits our ends of the earlier pipes; it must let go of them, or
            # none would ever see its pipe end.
            inherited = [*self._workers, ours]
            args = (theirs, job, inherited if fork else [])
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = _Worker(f"worker {number} of {workers}", process, ours)

    def map(
        self, items: Iterable[Item], place: Callable[[Item], str]
    ) -> Iterator[tuple[Item, Result]]:
        """``(item, job(item))`` in the order of ``items``, which is read only as needed.

        Raises
        ------
        Phi1Error
            The job raised one: the first in the order of the items.
        DataError
            A worker died; says which, how, and on what (``place``).
        RuntimeError
            The job raised something else; carries the worker's traceback.
        """
        source = iter(items)
        pending: deque[_Slot] = deque()
        idle = deque(list(self._workers.values()) * _QUEUED)
        exhausted = False
        while True:
            if idle and not exhausted and len(pending) < _AHEAD * len(self._workers):
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    continue
                slot = _Slot(item, place(item))
                pending.append(slot)
                idle.popleft().send(slot)
            elif pending and pending[0].finished:
                done = pending.popleft()
                if isinstance(done.result, Phi1Error):
                    raise done.result
                yield done.item, done.result
            elif pending:
                for worker in self._collect():
                    idle.append(worker)
                    # Nothing after a failure will be wanted, only what comes before it.
                    exhausted = exhausted or any(
                        isinstance(slot.result, Phi1Error) for slot in pending
                    )
            else:
                return

    def _collect(self) -> list[_Worker]:
        """Wait until something happens; take in results; return the workers now free."""
        free = []
        for ready in wait(list(self._workers)):
            worker = self._workers[ready]  # type: ignore[index]
            worker.receive()
            free.append(worker)
        return free

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers.values():
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join()
            worker.process.close()


def runs_one_thread() -> bool:
    """Whether this process has no thread but this one, in any library."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) == 1


class _Slot:
    """One item on its way, and its result when it is back."""

    def __init__(self, item: Any, place: str) -> None:
        self.item = item
        self.place = place
        self.finished = False
        self.result: Any = None


class _Worker:
    def __init__(self, name: str, process: Any, connection: Connection[Any, Any]) -> None:
        self.name = name
        self.process = process
        self.connection = connection
        self._slots: deque[_Slot] = deque()  # the first is the one under way

    def send(self, slot: _Slot) -> None:
        self._slots.append(slot)
        try:
            self.connection.send(slot.item)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._death() from error

    def receive(self) -> None:
        try:
            failure, result = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._death() from error
        assert self._slots, "a worker answered without having been asked"
        slot = self._slots.popleft()
        if failure is not None:
            raise RuntimeError(f"preprocessing {self.name} failed on {slot.place}:\n{failure}")
        slot.result, slot.finished = result, True

    def _death(self) -> DataError:
        self.process.join(timeout=5)
        code = self.process.exitcode
        how = f"exited with code {code}"
        advice = ""
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                advice = "; out of memory is the usual cause: try fewer --workers"
        on = " while it waited for work"
        if self._slots:
            on = f" while it encoded {self._slots[0].place}"
        return DataError(
            f"preprocessing {self.name} (process {self.process.pid}) {how}{on}{advice}."
        )


def _serve(
    connection: Connection[Any, Any],
    job: Callable[[Any], Any],
    inherited: list[Connection[Any, Any]],
) -> None:
    """A worker's life: answer until the parent goes away."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the parent's handler
    end_with_parent()
    # This process is one of the threads; the tokenizer library must not start more.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer: tuple[str | None, Any] = (None, job(item))
        except Phi1Error as error:
            answer = (None, error)
        except Exception:  # noqa: BLE001 - the parent is told, with the traceback
            answer = (traceback.format_exc(), None)
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
