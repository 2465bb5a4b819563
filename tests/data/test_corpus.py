"""The standard library as a corpus: which files, in which order, written whole."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from phi1_megatron.data.corpus import write_standard_library_corpus
from phi1_megatron.errors import DataError


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def library(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_the_running_python_gives_a_real_corpus_twice_the_same(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = write_standard_library_corpus(tmp_path / "a.jsonl", lambda *p: seen.append(p))
    again = write_standard_library_corpus(tmp_path / "b.jsonl")
    assert report.path.read_bytes() == again.path.read_bytes()
    written = rows(report.path)
    assert report.documents == len(written) > 300
    assert report.text_bytes == sum(len(row["text"].encode()) for row in written) > 5_000_000
    assert seen[-1][0] == seen[-1][1] == report.documents + sum(report.left_out.values())
    paths = {row["path"] for row in written}
    assert {"argparse.py", "json/decoder.py"} <= paths
    assert all(row["license"] == "PSF-2.0" for row in written)
    ast.parse(next(row["text"] for row in written if row["path"] == "argparse.py"))
    for path in paths:
        folders, name = path.split("/")[:-1], path.split("/")[-1]
        assert not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(folders)
        assert not name.startswith("test_")


def test_tests_packages_residue_duplicates_and_unreadable_files_stay_out(tmp_path: Path) -> None:
    root = library(
        tmp_path / "lib",
        {
            "good.py": b"x = 1\n",
            "sub/also.py": "s = 'é'\n".encode(),
            "sub/twin.py": b"x = 1\n",
            "empty.py": b" \n",
            "latin.py": b"s = '\xe9'\n",
            "test/a.py": b"1",
            "sub/tests/b.py": b"2",
            "idlelib/idle_test/c.py": b"3",
            "test_d.py": b"4",
            "site-packages/e.py": b"5",
            "dist-packages/f.py": b"6",
            "__pycache__/g.py": b"7",
            "_sysconfigdata__linux.py": b"8",
            "notes.txt": b"9",
        },
    )
    report = write_standard_library_corpus(tmp_path / "a.jsonl", root=root)
    texts = {row["text"] for row in rows(report.path)}
    assert texts == {"x = 1\n", "s = 'é'\n"}
    assert report.left_out == {"duplicate": 1, "empty": 1, "not UTF-8": 1}


def test_the_order_depends_on_the_paths_alone_and_is_not_alphabetical(tmp_path: Path) -> None:
    names = [f"m{n:02}.py" for n in range(30)]
    for root in ("a", "b"):
        library(tmp_path / root, {name: f"{root}, {name}".encode() for name in names})
        write_standard_library_corpus(tmp_path / f"{root}.jsonl", root=tmp_path / root)
    first, second = ([r["path"] for r in rows(tmp_path / f"{root}.jsonl")] for root in "ab")
    assert first == second != sorted(first)
    assert sorted(first) == names


def test_a_folder_without_source_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match="holds no Python source"):
        write_standard_library_corpus(tmp_path / "out" / "a.jsonl", root=tmp_path / "lib")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    root = library(tmp_path / "lib", {"a.py": b"1", "b.py": b"2"})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_standard_library_corpus(tmp_path / "out" / "a.jsonl", interrupt, root)
    assert list((tmp_path / "out").iterdir()) == []
