"""What is installed, what it asks for, and the script that sets a newcomer up."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import phi1_megatron

ROOT = Path(__file__).resolve().parent.parent

NOT_FROM_PYPI = {"apex", "amp_C"}
"""Imports that are NVIDIA's apex: built from its repository, used where it is found."""

PACKAGE_OF_IMPORT = {
    "flash_attn": "transformer-engine",  # used through TransformerEngine, never by us
    "huggingface_hub": "huggingface-hub",
    "megatron": "megatron-core",
    "tomli_w": "tomli-w",
    "transformer_engine": "transformer-engine",
}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """What setup.py hands to setuptools, asked for in a process of its own."""
    script = (
        "import json, setuptools\n"
        "seen = {}\n"
        "setuptools.setup = lambda **kw: seen.update(kw)\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})\n"
        "print(json.dumps(seen))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def requirements(declared: dict[str, Any], *extras: str) -> dict[str, Requirement]:
    texts = [
        *declared["install_requires"],
        *(t for e in extras for t in declared["extras_require"][e]),
    ]
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def test_the_version_is_the_package_s_own(declared: dict[str, Any]) -> None:
    assert declared["version"] == phi1_megatron.__version__


def test_reading_the_version_imports_nothing_of_the_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= {"__future__", "re", "pathlib", "setuptools"}


def test_phi1_is_the_command(declared: dict[str, Any]) -> None:
    assert declared["entry_points"]["console_scripts"] == ["phi1 = phi1_megatron.entry:main"]


def test_no_requirement_names_the_unrelated_package_apex(declared: dict[str, Any]) -> None:
    every = requirements(declared, *declared["extras_require"])
    assert "apex" not in {name.lower() for name in every}


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("2.5.1", False), ("2.6.0", True), ("2.11.0", True), ("2.13.0+cpu", True), ("2.14.0", False)],
)
def test_torch_has_a_ceiling(declared: dict[str, Any], version: str, wanted: bool) -> None:
    assert requirements(declared)["torch"].specifier.contains(version) is wanted


def test_what_needs_a_gpu_or_an_mpi_library_is_an_extra(declared: dict[str, Any]) -> None:
    base = requirements(declared)
    assert not {"transformer-engine", "flash-attn", "mpi4py", "wandb"} & set(base)
    assert "transformer-engine" in requirements(declared, "gpu")
    assert "mpi4py" in requirements(declared, "mpi")


def test_psutil_is_declared_since_megatron_core_does_not(declared: dict[str, Any]) -> None:
    assert "psutil" in requirements(declared)


def test_every_folder_of_modules_is_packaged(declared: dict[str, Any]) -> None:
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "phi1_megatron").rglob("*.py")
    }
    assert folders == set(declared["packages"]), "a folder without __init__.py is left out"


def test_every_import_is_declared(declared: dict[str, Any]) -> None:
    every = set(requirements(declared, *declared["extras_require"]))
    ours = {"phi1_megatron", "tools"}
    for folder in ("phi1_megatron", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - ours - NOT_FROM_PYPI:
                    known = (
                        top in sys.stdlib_module_names or PACKAGE_OF_IMPORT.get(top, top) in every
                    )
                    assert known, f"{path.relative_to(ROOT)} imports {top}, which setup.py lacks"


def test_the_license_is_apache_2(declared: dict[str, Any]) -> None:
    assert declared["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


FAKE_PYTHON = """#!/bin/sh
# A Python that answers questions for real and only notes down what it is asked to install.
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    case "$3" in
    --version) ;;
    show) exit 1 ;;
    *) printf '%s\\n' "$*" >>"$FAKE_LOG" ;;
    esac ;;
*)
    [ ! -e "${FAKE_NO_ENSUREPIP:-}" ] || case "$2" in *ensurepip*) exit 1 ;; esac
    [ -z "${FAKE_OLD:-}" ] || case "$2" in *version_info*) exit 1 ;; esac
    [ -z "${FAKE_NETWORK:-}" ] || case "$2" in *urlopen*) [ "$FAKE_NETWORK" = up ]; exit ;; esac
    exec "$REAL_PYTHON" "$@" ;;
esac
"""


class SetUp:
    """A clone in a folder whose name has spaces, and a Python that installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "a clone with spaces"
        self.bin = folder / "bin"
        self.log = folder / "pip.log"
        (self.clone / "tools" / "setup").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.py", "pyproject.toml", "tools/setup/make_venv.sh"):
            shutil.copy(ROOT / name, self.clone / name)
        self.program("python3.11", FAKE_PYTHON)
        self.program("uname", "echo Linux")

    def program(self, name: str, script: str) -> None:
        """Put a program of our making before all others."""
        (self.bin / name).write_text(
            script if script.startswith("#!") else f"#!/bin/sh\n{script}\n"
        )
        (self.bin / name).chmod(0o755)

    def run(self, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "tools/setup/make_venv.sh", *extras],
            cwd=self.clone,
            env={
                "PATH": f"{self.bin}:{os.defpath}",
                "REAL_PYTHON": sys.executable,
                "FAKE_LOG": str(self.log),
                "TORCH_INDEX": "none",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def installs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_set_up_installs_once_and_again_only_after_a_change(set_up: SetUp) -> None:
    first = set_up.run("dev")
    assert first.returncode == 0, first.stderr
    assert [line.split()[-1] for line in set_up.installs()] == [".[dev]"]
    second = set_up.run("dev")
    assert (second.returncode, second.stdout) == (0, "")
    assert len(set_up.installs()) == 1
    with (set_up.clone / "setup.py").open("a") as file:
        file.write("# changed\n")
    set_up.run("dev")
    assert len(set_up.installs()) == 2


def test_set_up_keeps_the_extras_that_were_asked_for_before(set_up: SetUp) -> None:
    assert set_up.run().returncode == 0
    assert set_up.run("dev").returncode == 0
    assert set_up.run().returncode == 0  # satisfied by what dev installed
    assert set_up.run("mpi").returncode == 0
    asked = [line.split()[-1] for line in set_up.installs()]
    assert asked == [".", ".[dev]", ".[dev,mpi]"]


def test_set_up_takes_a_cpu_torch_only_where_its_index_answers(set_up: SetUp) -> None:
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA GPU, so no CPU build is looked for")
    assert set_up.run(TORCH_INDEX="", FAKE_NETWORK="down").returncode == 0
    assert "--extra-index-url" not in set_up.installs()[-1]
    assert set_up.run("dev", TORCH_INDEX="", FAKE_NETWORK="up").returncode == 0
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in set_up.installs()[-1]
    assert set_up.run("mpi", TORCH_INDEX="https://wheels.example/x").returncode == 0
    assert "--extra-index-url https://wheels.example/x" in set_up.installs()[-1]


def test_set_up_refuses_a_python_of_the_wrong_version_in_one_sentence(set_up: SetUp) -> None:
    done = set_up.run(FAKE_OLD="1", PYTHON=str(set_up.bin / "python3.11"))
    assert done.returncode == 1
    assert "is not a working Python 3.11, 3.12 or 3.13" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert set_up.installs() == []


def test_set_up_installs_debian_s_venv_package_as_root(set_up: SetUp, tmp_path: Path) -> None:
    lacking = tmp_path / "ensurepip is not there"
    lacking.touch()
    set_up.program("id", "echo 0")
    set_up.program("apt-get", f'echo "$*" >>"{tmp_path}/apt.log"; rm -f "{lacking}"')
    done = set_up.run(FAKE_NO_ENSUREPIP=str(lacking))
    assert done.returncode == 0, done.stderr
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    asked = (tmp_path / "apt.log").read_text().splitlines()
    assert asked[-1] == f"install -y -qq {package}"
    assert len(set_up.installs()) == 1


def test_set_up_says_how_to_get_the_venv_module_without_root(set_up: SetUp, tmp_path: Path) -> None:
    set_up.program("id", "echo 1000")
    set_up.program("apt-get", "exit 9")
    done = set_up.run(FAKE_NO_ENSUREPIP=str(tmp_path))
    assert done.returncode == 1
    assert "sudo apt-get install python3." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_failed_installation_is_tried_again_the_next_time(set_up: SetUp) -> None:
    assert set_up.run().returncode == 0
    setup = set_up.clone / "setup.py"
    before = setup.read_text()
    setup.write_text(before + "# changed\n")
    assert set_up.run(FAKE_LOG="/nowhere/pip.log").returncode == 1
    setup.write_text(before)  # as it was, but what pip left of the failed attempt is unknown
    assert set_up.run().returncode == 0
    assert len(set_up.installs()) == 2


def test_make_names_every_target_of_the_readme() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"quickstart", "test", "check", "clean", "help"} <= named
