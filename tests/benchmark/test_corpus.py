"""The corpus of the benchmark: the same bytes every time, nothing twice, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi1_megatron.benchmark.corpus import (
    read_input,
    source_folders,
    write_beginning,
    write_python_corpus,
)
from phi1_megatron.errors import DataError


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Two folders: sixty files, and copies, links and files that are no text among them."""
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "inner").mkdir(parents=True)
    two.mkdir()
    for number in range(60):
        folder = (one, one / "inner", two)[number % 3]
        (folder / f"duck_{number}.py").write_text(f"# é {number}\n" + "quack()\n" * 50)
    (two / "copy.py").write_bytes((one / "duck_0.py").read_bytes())
    (two / "link.py").symlink_to(one / "duck_3.py")
    (two / "broken_link.py").symlink_to(one / "nowhere.py")
    (two / "latin.py").write_bytes("# é".encode("latin-1"))
    (two / "empty.py").write_text(" \n")
    (two / "notes.txt").write_text("no source")
    return {"one": one, "two": two}


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_text_is_there_once_and_only_text(sources: dict[str, Path], tmp_path: Path) -> None:
    facts = write_python_corpus(tmp_path / "all.jsonl", 10, sources)
    texts = [row["text"] for row in rows(facts.path)]
    assert len(texts) == len(set(texts)) == facts.documents == 60
    assert facts.text_bytes == sum(len(text.encode()) for text in texts)
    assert facts.file_bytes == facts.path.stat().st_size


def test_the_same_files_give_the_same_bytes_in_an_order_that_mixes_folders(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    first = write_python_corpus(tmp_path / "a.jsonl", 10, sources)
    again = write_python_corpus(tmp_path / "b.jsonl", 10, dict(reversed(sources.items())))
    assert {row["text"] for row in rows(first.path)} == {row["text"] for row in rows(again.path)}
    once_more = write_python_corpus(tmp_path / "c.jsonl", 10, sources)
    assert first.sha256 == once_more.sha256
    names = [row["path"] for row in rows(first.path)]
    assert names != sorted(names)
    assert {name.split("/")[0] for name in names[:20]} == {"one", "two"}


def test_a_file_under_two_folders_is_taken_once(sources: dict[str, Path], tmp_path: Path) -> None:
    nested = {**sources, "inner": sources["one"] / "inner"}
    assert write_python_corpus(tmp_path / "a.jsonl", 10, nested).documents == 60


def test_it_ends_at_the_size_asked_for_and_is_a_beginning_of_the_whole(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    whole = write_python_corpus(tmp_path / "all.jsonl", 10, sources)
    part = write_python_corpus(tmp_path / "part.jsonl", 0.004, sources)
    longest = max(len(row["text"].encode()) for row in rows(whole.path))
    assert 4000 <= part.text_bytes < 4000 + longest
    assert whole.path.read_bytes().startswith(part.path.read_bytes())


def test_this_interpreter_has_sources_to_offer() -> None:
    folders = source_folders()
    assert (folders["stdlib"] / "json" / "decoder.py").is_file()
    assert any((folder / "rich" / "table.py").is_file() for folder in folders.values())
    assert len(set(folders.values())) == len(folders)


def test_without_any_source_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no Python sources were found"):
        write_python_corpus(tmp_path / "a.jsonl", 1, {"x": tmp_path / "nothing"})


def test_a_beginning_holds_whole_lines_and_at_least_one(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    whole = write_python_corpus(tmp_path / "all.jsonl", 10, sources)
    one = write_beginning(whole, tmp_path / "one.jsonl", 1e-9)
    some = write_beginning(whole, tmp_path / "some.jsonl", 0.005)
    assert one.documents == 1
    assert 5000 <= some.file_bytes < 6000
    assert rows(some.path) == rows(whole.path)[: some.documents]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\nduck\n', "line 2 is not a JSON object with a text"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is not"),
        (b'{"text": "a"}\n\n', "line 2 is not"),
        (b'{"text": 5}\n', "line 1 is not"),
        (b'{"text": "\xff"}\n', "line 1 is not"),
        (b"", "holds no text"),
    ],
)
def test_an_input_that_a_contender_would_stumble_over_is_refused(
    content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_input(tmp_path / "in.jsonl")


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl could not be read"):
        read_input(tmp_path / "absent.jsonl")
