"""The arrows: which room may import which, and what must start without torch.

The arrows are drawn in CONTRIBUTING.md. Imports are read from the source at any depth, inside
functions too: a late import is as much of a dependency as an early one.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "phi1_megatron"
ROOT = Path(__file__).resolve().parent.parent
TOP = {"entry", "cli", "commands", "doctor", "quickstart", "__main__"}
"""The verbs and what only they use: they may import every room, and no room imports them."""

FOUNDATION = {"config", "planning", "distributed"}
ROOMS_BELOW = {
    "errors": set(),
    "config": set(),
    "planning": {"config", "distributed"},
    "distributed": {"config"},
    "data": {"config", "distributed"},
    "models": {"config", "distributed"},
    "checkpoint": FOUNDATION | {"data", "models"},
    "training": FOUNDATION | {"data", "models", "checkpoint"},
    "inference": FOUNDATION | {"data", "models", "checkpoint"},
    "evaluation": FOUNDATION | {"data", "models", "checkpoint", "training", "inference"},
    "benchmark": FOUNDATION | {"data", "models", "checkpoint", "training", "inference"},
    "curation": {"config", "data"},
}
"""What each room may import besides itself and ``errors``."""

CURATION_READS = {"data.documents", "data.indexed"}
"""All that curation may know of data: its readers and writers."""

PLANNING_READS = {"distributed.layout"}
"""All that planning may know of distributed: the layout's arithmetic."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importing module, imported module) → the reason why this arrow may run against the others."""

WITHOUT_TORCH = [
    "distributed.layout",
    "checkpoint.hf_mapping",
    "commands.preprocessing",
    "commands.runner",
    "entry",
    "data.check_process",
    "data.definition",
    "data.documents",
    "data.engine",
    "data.tokenizer",
    "data.indexed",
    "data.preprocess",
    "data.corpus",
    "commands.doctor",
    "cli",
]
"""Modules that start at once, besides every one of ``ROOMS_WITHOUT_TORCH``."""

ROOMS_WITHOUT_TORCH = {"errors", "config", "planning", "doctor"}
HEAVY = ["torch", "megatron", "transformers"]


def modules_under(folder: Path) -> dict[str, Path]:
    """Dotted name, relative to ``folder`` → file."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }


def imports_of(source: str) -> Iterator[str]:
    """Every module that a source imports by a statement or by a literal ``import_module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow points"
            assert node.module is not None
            # `from a import b` may import the module a.b: name both
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = called.id if isinstance(called, ast.Name) else called
            argument = node.args[0]
            if name in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
                yield str(argument.value)


def our_imports(source: str) -> set[str]:
    """The modules of this package among a source's imports, without the package's name."""
    prefix = f"{PACKAGE}."
    return {name.removeprefix(prefix) for name in imports_of(source) if name.startswith(prefix)}


def room_of(module: str) -> str:
    return module.split(".")[0]


def arrow_is_wrong(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``, or None where it may."""
    here, there = room_of(importer), room_of(imported)
    if here in TOP or there in {here, "errors", "__version__"}:
        return None
    if (importer, imported) in EXCEPTIONS:
        return None
    if there not in ROOMS_BELOW.get(here, set()):
        return f"{importer} imports {imported}: {here} may know only {ROOMS_BELOW.get(here)}"
    if here == "curation" and there == "data":
        known = any(imported == m or imported.startswith(f"{m}.") for m in CURATION_READS)
        if not known and imported != "data":
            return f"{importer} imports {imported}: curation may read only {CURATION_READS}"
    if here == "planning" and there == "distributed":
        known = any(imported == m or imported.startswith(f"{m}.") for m in PLANNING_READS)
        if not known and imported != "distributed":
            return f"{importer} imports {imported}: planning may read only {PLANNING_READS}"
    return None


MODULES = modules_under(ROOT / PACKAGE)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    assert room_of(module) in TOP | set(ROOMS_BELOW), f"{module} is in a room that nobody drew"
    source = MODULES[module].read_text(encoding="utf-8")
    wrong = [arrow_is_wrong(module, imported) for imported in sorted(our_imports(source))]
    assert [reason for reason in wrong if reason] == []


def test_the_package_itself_imports_no_room() -> None:
    assert our_imports(MODULES["__init__"].read_text(encoding="utf-8")) == set()


def test_exceptions_are_still_in_use() -> None:
    for (importer, imported), reason in EXCEPTIONS.items():
        assert reason
        assert imported in our_imports(MODULES[importer].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("config.load", "distributed.layout"),
        ("planning.planner", "distributed.launch"),
        ("data.datasets", "models.phi1"),
        ("models.phi1", "data.tokenizer"),
        ("checkpoint.store", "training.trainer"),
        ("training.trainer", "inference.generation"),
        ("inference.generation", "training.metrics"),
        ("curation.dedup", "data.tokenizer"),
        ("training.trainer", "cli"),
        ("distributed.launch", "doctor"),
    ],
)
def test_an_upward_or_sideways_arrow_is_refused(importer: str, imported: str) -> None:
    assert arrow_is_wrong(importer, imported) is not None


def test_imports_are_seen_inside_functions_and_through_import_module() -> None:
    source = (
        "def late():\n"
        "    from phi1_megatron.training import trainer\n"
        "    import phi1_megatron.models.phi1\n"
        "    import_module('phi1_megatron.data.indexed')\n"
        "    importlib.import_module('phi1_megatron.cli')\n"
    )
    seen = our_imports(source)
    assert {"training.trainer", "models.phi1", "data.indexed", "cli"} <= seen


@pytest.mark.parametrize("folder", [PACKAGE, "tools"])
def test_nobody_imports_megatron_lm_s_script_layer(folder: str) -> None:
    for name, path in modules_under(ROOT / folder).items():
        for imported in imports_of(path.read_text(encoding="utf-8")):
            outside = imported.split(".")[:2] in (["megatron", "training"], ["megatron", "legacy"])
            assert not outside, f"{name} imports {imported}"


@pytest.mark.parametrize("folder", [PACKAGE, "tools"])
def test_nobody_touches_the_import_path(folder: str) -> None:
    for name, path in modules_under(ROOT / folder).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            touched = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
            assert not touched, f"{name} uses sys.path: install the package in its place"


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    names = {name for name in MODULES if name.split(".")[-1] in drawers}
    assert names == set()


def heavy_modules_after(statement: str) -> list[str]:
    """Which heavy libraries a fresh interpreter holds after ``statement``."""
    script = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "module", WITHOUT_TORCH + [name for name in MODULES if room_of(name) in ROOMS_WITHOUT_TORCH]
)
def test_a_light_module_starts_without_torch(module: str) -> None:
    assert heavy_modules_after(f"import {PACKAGE}.{module}") == []


def test_the_check_for_heavy_modules_sees_one() -> None:
    assert heavy_modules_after("import sys; sys.modules['torch'] = sys") == ["torch"]


def test_help_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert f"{PACKAGE}.cli" in loaded  # the listing is there at all
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


def test_help_answers_within_a_fraction_of_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", PACKAGE, "--help"],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},  # the second try finds bytecode
        )
        return time.perf_counter() - start

    # the fastest of several: other work on the machine only ever adds
    assert min(seconds() for _ in range(5)) < 0.9
