"""Preprocessing in a process that is forked before the command line is read.

Half of a short run is loading: libraries, command line, tokenizer. So the process that will do the
work is forked first thing, and loads its libraries on one core while this one reads the command
line on another. This one then only shows how far it is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeAlias

from phi1_megatron.distributed.lifetime import end_with_parent
from phi1_megatron.errors import DataError, Phi1Error

Request: TypeAlias = Mapping[str, Any]
OnProgress: TypeAlias = Callable[[int, int, int, int], None]
Work: TypeAlias = Callable[[Request, OnProgress], list[str] | None]

_TIDY_SECONDS = 0.2

_started: list[Runner] = []  # by the entry point; taken by the verb


class Runner:
    """The forked process, as this one sees it."""

    def __init__(self, pid: int, connection: Connection[Any, Any]) -> None:
        self._pid, self._connection = pid, connection

    def run(self, request: Request, on_progress: OnProgress) -> list[str] | None:
        """Have the work done.

        Raises
        ------
        Phi1Error
            The work did.
        DataError
            The process was killed.
        RuntimeError
            The work failed otherwise; carries the traceback.
        """
        try:
            self._connection.send(request)
            while True:
                kind, content = self._connection.recv()
                if kind == "progress":
                    on_progress(*content)
                elif kind == "done":
                    return list(content) if content is not None else None
                elif isinstance(content, Phi1Error):
                    raise content
                else:
                    raise RuntimeError(f"preprocessing failed:\n{content}")
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            status = os.waitstatus_to_exitcode(self._wait())
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else "ended"
            raise DataError(
                f"the preprocessing process (process {self._pid}) {how}; out of memory is the "
                "usual cause; the same command goes on from what is done."
            ) from error
        except KeyboardInterrupt:
            # Ctrl-C reaches it too, and it tidies up before it ends.
            deadline = time.monotonic() + _TIDY_SECONDS
            while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
            self._terminate()
            raise
        except SystemExit:
            self._terminate()
            raise
        finally:
            self._connection.close()
            self._wait()

    def _terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)

    def _wait(self) -> int:
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:
            return 0
        return status


def start(warm: Callable[[], Work]) -> None:
    """Fork the process that will work; ``warm`` loads what it needs and gives what it does."""
    ours, theirs = Pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        _started.append(Runner(pid, ours))
        return
    ours.close()
    code = 1
    try:
        end_with_parent()
        if os.getppid() == parent:
            code = _serve(theirs, warm)
    except SystemExit:
        code = 128 + signal.SIGTERM  # this process's own handler; it has tidied up
    except BaseException:  # noqa: BLE001 - the parent's stack lies below, and must not go on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def take() -> Runner | None:
    """The process that was started for this command, if one was."""
    return _started.pop() if _started else None


def _serve(connection: Connection[Any, Any], warm: Callable[[], Work]) -> int:
    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        work = warm()
        request = connection.recv()
    except (EOFError, KeyboardInterrupt):
        return 0  # the command line was wrong, asked for help, or was interrupted
    answer: tuple[str, Any]
    try:
        lines = work(request, lambda *progress: connection.send(("progress", progress)))
        answer = ("done", lines)
    except Phi1Error as error:
        answer = ("failed", error)
    except KeyboardInterrupt:
        return 130
    except Exception:  # noqa: BLE001 - the parent is told, with the traceback
        answer = ("failed", traceback.format_exc())
    try:
        connection.send(answer)
    except (BrokenPipeError, ConnectionResetError):
        return 1
    return 0
