"""The command line: its verbs, its exit codes, and what a person sees when something is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from phi1_megatron import __version__
from phi1_megatron.cli import _GROUPS, _VERBS, build_app, run_app, run_single
from phi1_megatron.errors import (
    CheckpointError,
    DataError,
    LaunchError,
    LayoutError,
    Phi1Error,
    RecipeError,
)

TINY = Path(__file__).resolve().parent.parent / "examples" / "recipes" / "phi1_tiny_cpu.toml"
PATHS = [(verb, verb) for verb in _VERBS] + [
    (group, verb) for group, (_, verbs) in _GROUPS.items() for verb in verbs
]


def phi1(*words: str) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        run_app(build_app(), list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(autouse=True)
def _no_launcher_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("module", "function"), PATHS)
def test_every_verb_leads_to_a_documented_function(module: str, function: str) -> None:
    verb = getattr(importlib.import_module(f"phi1_megatron.commands.{module}"), function)
    assert callable(verb)
    assert verb.__doc__


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_lists_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert phi1(*words) == 0
    listed = capsys.readouterr().out
    for name in [*_VERBS, *_GROUPS]:
        assert f"│ {name} " in listed


@pytest.mark.parametrize("group", _GROUPS)
def test_a_group_s_help_lists_its_verbs(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert phi1(group, "--help") == 0
    listed = capsys.readouterr().out
    for name in _GROUPS[group][1]:
        assert f"│ {name} " in listed


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_verb_explains_itself(
    path: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [path[0]] if path[0] == path[1] and path[0] in _VERBS else list(path)
    assert phi1(*words, "--help") == 0
    assert f"Usage: phi1 {' '.join(words)}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert phi1("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], 'Did you mean "train"?'),
        (["tokenizer", "trian"], 'Did you mean "train"?'),
        (["train"], "RECIPE"),
        (["train", str(TINY), "--dry-rum"], "--dry-run"),
        (["train", str(TINY), "--num-processes", "two"], "unable to convert"),
        (["train", str(TINY), "--num-processes", "0"], "Must be >= 1"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_a_hint(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phi1(*words) == 2
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).replace("│", " ").split())
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere.toml"], 2, "there is no recipe nowhere.toml"),
        ([str(TINY), "model.num_layer=2"], 2, "did you mean model.num_layers?"),
        ([str(TINY), "--dry-run", "--num-processes", "3"], 2, "start a multiple of 2"),
        ([str(TINY), 'data.blend=["missing"]'], 1, "missing"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_without_a_traceback(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phi1("train", *words) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("phi1: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_debug_gives_the_error_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe nowhere\.toml"):
        run_app(build_app(), ["train", "nowhere.toml", "--debug"])


def test_debug_prints_a_traceback_and_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phi1_megatron", "train", "--debug", str(TINY), "training.lr=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")
    assert "RecipeError" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("told"), 2),
        (LayoutError("told"), 2),
        (DataError("told"), 1),
        (CheckpointError("told"), 1),
        (LaunchError("told"), 1),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    error: Phi1Error, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    app = build_app()

    @app.command
    def fail() -> None:
        """Fail."""
        raise error

    with pytest.raises(SystemExit) as ended:
        run_app(app, ["fail"])
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("phi1: ")


def test_an_interrupt_exits_with_130() -> None:
    app = build_app()

    @app.command
    def wait() -> None:
        """Be interrupted."""
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_app(app, ["wait"])
    assert ended.value.code == 130


def test_a_bug_of_our_own_keeps_its_traceback() -> None:
    app = build_app()

    @app.command
    def stumble() -> None:
        """Stumble."""
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_app(app, ["stumble"])


def test_a_verb_runs_as_a_script_of_its_own_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "nowhere.toml"])
    with pytest.raises(SystemExit) as ended:
        run_single("phi1_megatron.commands.train:train", "train.py")
    assert ended.value.code == 2
    assert "there is no recipe nowhere.toml" in capsys.readouterr().err


def test_a_dry_run_on_a_folder_of_another_run_refuses_as_training_would(tmp_path: Path) -> None:
    from phi1_megatron.checkpoint.folder import Progress, checkpoint_path, write_run_file
    from phi1_megatron.config.load import load_recipe

    saved = checkpoint_path(tmp_path / "run", 100)
    saved.mkdir(parents=True)
    write_run_file(saved, Progress(100, 1600, "one"), load_recipe(TINY))
    words = ["train", str(TINY), "--dry-run", "--run-dir", str(tmp_path / "run")]
    assert phi1(*words) == 0
    assert phi1(*words, "training.seed=5") == 1
