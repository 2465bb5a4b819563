"""Whole process trees: their time, their memory, and that nothing of them stays behind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from phi1_megatron.benchmark import process_tree
from phi1_megatron.benchmark.process_tree import Finished, run_tree, tree_of

HOLD_200_MB = "import time; held = b'x' * 200_000_000; time.sleep(0.6)"
START_A_SLEEPER = (
    "import pathlib, subprocess, sys, time\n"
    "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "pathlib.Path(sys.argv[1]).write_text(str(sleeper.pid))\n"
)


def run(
    tmp_path: Path,
    script: str,
    *arguments: str,
    timeout_seconds: float = 60,
    sampling_share: float = 0.0,
    on_tick: Callable[[float], None] | None = None,
) -> Finished:
    return run_tree(
        [sys.executable, "-c", script, *arguments],
        environment=os.environ,
        stderr=tmp_path / "stderr.txt",
        timeout_seconds=timeout_seconds,
        sampling_share=sampling_share,
        on_tick=on_tick,
    )


def is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_grandchild_s_memory_is_counted(tmp_path: Path) -> None:
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD_200_MB!r}])"
    memory = run(tmp_path, script, sampling_share=0.2).memory
    assert memory is not None
    assert memory.pss_bytes is not None
    assert 200e6 < memory.pss_bytes < 260e6
    assert 200e6 < memory.rss_bytes < 280e6
    assert 0 < memory.cost_seconds < 0.5


def test_pages_that_processes_share_count_once_as_pss_and_each_time_as_rss(tmp_path: Path) -> None:
    script = (
        "import os, time\nheld = b'x' * 200_000_000\n"
        "children = [os.fork(), os.fork()]\n"  # four processes
        "time.sleep(0.6)\n[os.waitpid(child, 0) for child in children if child]\n"
    )
    memory = run(tmp_path, script, sampling_share=0.2).memory
    assert memory is not None
    assert memory.pss_bytes is not None
    assert 200e6 < memory.pss_bytes < 280e6
    assert 800e6 < memory.rss_bytes < 960e6


def test_looking_at_memory_keeps_to_its_share_of_the_time(tmp_path: Path) -> None:
    done = run(tmp_path, HOLD_200_MB.replace("0.6", "1"), sampling_share=0.01)
    assert done.memory is not None
    assert done.memory.rss_bytes > 200e6
    assert done.memory.cost_seconds < 0.05 * done.seconds


def test_time_is_from_start_to_exit_and_the_exit_code_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "import sys, time; time.sleep(0.5); sys.exit('out of ducks')")
    assert 0.5 < done.seconds < 3
    assert done.exit_code == 1
    assert done.memory is None
    assert (tmp_path / "stderr.txt").read_text() == "out of ducks\n"


def test_processor_time_of_children_is_counted(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    assert 0.4 <= run(tmp_path, script).processor_seconds < 2


def test_what_takes_too_long_is_killed_with_all_it_started(tmp_path: Path) -> None:
    started = time.monotonic()
    script = START_A_SLEEPER + "time.sleep(60)"
    done = run(tmp_path, script, str(tmp_path / "pid"), timeout_seconds=1)
    assert done.exit_code is None
    assert time.monotonic() - started < 20
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_what_ignores_a_polite_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_tree, "_PATIENCE_SECONDS", 0.3)
    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + START_A_SLEEPER
        + "time.sleep(60)"
    )
    done = run(tmp_path, script, str(tmp_path / "pid"), timeout_seconds=1)
    assert done.exit_code is None
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_an_interrupt_here_ends_all_of_it(tmp_path: Path) -> None:
    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, START_A_SLEEPER + "time.sleep(60)", str(tmp_path / "pid"), on_tick=interrupt)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_what_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    done = run(tmp_path, START_A_SLEEPER, str(tmp_path / "pid"))
    assert done.exit_code == 0
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_the_tree_holds_children_of_other_threads_and_no_strangers(tmp_path: Path) -> None:
    seen: list[int] = []
    script = (
        "import threading, time\n"
        f"import sys; code = {START_A_SLEEPER!r} + 'sleeper.wait()'\n"
        "threading.Thread(target=exec, args=(code, {})).start(); time.sleep(60)"
    )

    def look(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            me = psutil.Process(os.getpid())
            below = {process.pid for process in me.children(recursive=True)}
            child = next(p.pid for p in me.children() if str(tmp_path / "pid") in p.cmdline())
            seen.extend(tree_of(child))
            assert set(seen) <= below
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, script, str(tmp_path / "pid"), on_tick=look)
    assert int((tmp_path / "pid").read_text()) in seen
