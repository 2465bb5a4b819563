"""A process that holds ids against the reference beside a run.

It opens the reference, which takes as long as opening an engine, while the engine is opened; and it
ends, and its memory with it, before the workers need theirs.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from phi1_megatron.data.definition import TokenizerDefinition
from phi1_megatron.data.sample_check import SampleCheck
from phi1_megatron.data.worker_pool import runs_one_thread
from phi1_megatron.distributed.lifetime import end_with_parent
from phi1_megatron.errors import DataError


class Compared(NamedTuple):
    """One document to compare: where it is from, and its ids without an end."""

    place: str
    text: str
    ids: Sequence[int]


class CheckProcess:
    """Compares documents in a process of its own; a difference is raised as soon as it is known.

    Raises
    ------
    DataError
        From every method: a document's ids are not the reference's, or the process died.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        fork = runs_one_thread()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._ours, theirs = context.Pipe()
        args = (theirs, definition, self._ours if fork else None)
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self._done: int | None = None

    def compare(self, documents: Sequence[Compared]) -> None:
        """Have documents compared; nothing once :meth:`finish` was called."""
        if self._done is None:
            self._send(list(documents))
            if self._ours.poll():
                self._take()

    def finish(self) -> int:
        """Wait for what is not yet compared, and end the process; gives the documents compared."""
        if self._done is None:
            self._send(None)
            self._done = self._take()
            self._process.join()
        return self._done

    def stop(self) -> None:
        """End the process at once, whatever it does."""
        self._ours.close()
        self._process.terminate()
        self._process.join()

    def _send(self, message: list[Compared] | None) -> None:
        try:
            self._ours.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._take()  # the reason why it is gone, if it could still tell

    def _take(self) -> int:
        try:
            answer = self._ours.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(timeout=5)
            raise DataError(
                f"the process that compares ids with Hugging Face's (process {self._process.pid}) "
                f"ended with code {self._process.exitcode}; out of memory is the usual cause."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return int(answer)


def _serve(
    theirs: Connection[Any, Any],
    definition: TokenizerDefinition,
    inherited: Connection[Any, Any] | None,
) -> None:
    if inherited is not None:
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the parent's handler
    end_with_parent()
    check = SampleCheck(definition)
    try:
        check.open()
        while (documents := theirs.recv()) is not None:
            for place, text, ids in documents:
                check.compare(text, np.asarray(ids, np.int64), place)
        theirs.send(check.documents)
    except DataError as error:
        theirs.send(error)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return  # the run is over
