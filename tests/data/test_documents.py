"""Reading documents: every format and place, and what becomes of rows that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi1_megatron.data.documents import BadRows, RowReader, iterate_documents
from phi1_megatron.data.inputs import find_inputs
from phi1_megatron.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n", "Grüße, 世界 🦆", "x = '\\u2028'\u2028y", "\t\ttabs"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_every_compression_gives_the_same_documents_with_their_places(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](jsonl(TEXTS)))
    documents = list(iterate_documents([path]))
    assert [d.text for d in documents] == TEXTS
    assert [(d.source, d.line) for d in documents] == [(str(path), n) for n in range(1, 5)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_joined_end_to_end_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](jsonl(TEXTS[:2])) + PACKERS[suffix](jsonl(TEXTS[2:])))
    assert [d.text for d in iterate_documents([path])] == TEXTS


def test_parquet_gives_the_same_documents_and_sets_null_rows_aside(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"n": list(range(5)), "text": [*TEXTS[:2], None, *TEXTS[2:]]})
    parquet.write_table(table, path, row_group_size=2)
    bad = BadRows()
    documents = list(iterate_documents([path], bad_rows=bad))
    assert [d.text for d in documents] == TEXTS
    assert [d.line for d in documents] == [1, 2, 4, 5]
    assert bad.counts == {"wrong type": 1}


def test_a_parquet_file_without_the_column_is_refused_with_its_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"content": ["x"]}), path)
    with pytest.raises(DataError, match="no column 'text'; its columns are content"):
        list(iterate_documents([path]))


def test_a_file_that_only_says_it_is_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet is not a parquet file"):
        list(iterate_documents([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("suffix", "module"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")]
)
def test_a_missing_optional_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{module}: pip install 'phi1-megatron\[data\]'"):
        list(iterate_documents([tmp_path / f"a{suffix}"]))


def test_standard_input_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl(TEXTS))))
    assert [d.text for d in iterate_documents(["-"])] == TEXTS


def test_folders_and_patterns_are_read_in_sorted_order_and_files_as_given(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.jsonl.gz", "a.json", ".hidden.jsonl", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(jsonl([name])) if name.endswith("gz") else jsonl([name]))
    assert [d.text for d in iterate_documents([tmp_path])] == [
        "a.json",
        "b.jsonl",
        "sub/a.jsonl.gz",
    ]
    assert find_inputs([f"{tmp_path}/*.json*"]) == [f"{tmp_path}/a.json", f"{tmp_path}/b.jsonl"]
    given = [f"{tmp_path}/b.jsonl", f"{tmp_path}/notes.txt", f"{tmp_path}/a.json"]
    assert find_inputs(given) == given


@pytest.mark.parametrize("name", ["absent.jsonl", "*.nothing", "empty"])
def test_an_input_that_matches_nothing_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="input not found"):
        find_inputs([tmp_path / name])


BAD_LINES = {
    b'{"text": "cut': "broken JSON",
    b'{"text": "a"} {"text": "b"}': "broken JSON",
    b'{"content": "a"}': "missing key",
    b'{"text": 3}': "wrong type",
    b'{"text": null}': "wrong type",
    b'{"text": ["a"]}': "wrong type",
    b'["text"]': "wrong type",
    b'{"text": "\xff\xfe"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "invalid UTF-8",
    b'{"text": ""}': "empty text",
    b"[" * 100_000: "broken JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=lambda v: str(v)[:24])
def test_a_bad_row_is_counted_and_quarantined_and_its_neighbours_are_kept(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path, quarantine = tmp_path / "a.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes(jsonl(["first"]) + line + b"\n" + jsonl(["last"]))
    with BadRows(quarantine) as bad:
        assert [d.text for d in iterate_documents([path], bad_rows=bad)] == ["first", "last"]
    assert bad.counts == {reason: 1}
    row = json.loads(quarantine.read_text())
    assert (row["input"], row["line"], row["reason"]) == (str(path), 2, reason)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_archive_gives_its_whole_lines_and_one_bad_row(
    tmp_path: Path, suffix: str
) -> None:
    rows = [f"{n} {n * 7919 % 10007}" * 20 for n in range(20_000)]
    path = tmp_path / f"a.jsonl{suffix}"
    packed = PACKERS[suffix](jsonl(rows))
    path.write_bytes(packed[: len(packed) * 3 // 4])
    (tmp_path / "b.jsonl").write_bytes(jsonl(["next input"]))
    bad = BadRows()
    texts = [d.text for d in iterate_documents([path, tmp_path / "b.jsonl"], bad_rows=bad)]
    assert 0 < len(texts) < len(rows)
    assert texts == [*rows[: len(texts) - 1], "next input"]
    # zstd may hand out the line that the cut went through; the others stop before it.
    assert bad.counts["truncated or damaged compression"] + bad.counts["broken JSON"] >= 1


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_an_archive_of_another_kind_than_its_name_is_a_bad_row(tmp_path: Path, suffix: str) -> None:
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(jsonl(TEXTS))
    bad = BadRows()
    assert list(iterate_documents([path], bad_rows=bad)) == []
    assert bad.counts == {"truncated or damaged compression": 1}


def test_strict_stops_at_the_first_bad_row_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["fine"]) + b'{"content": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: missing key \(no 'text'\)"):
        list(iterate_documents([path], bad_rows=BadRows(strict=True)))


def test_the_quarantine_appears_only_when_all_went_well_and_something_was_bad(
    tmp_path: Path,
) -> None:
    quarantine = tmp_path / "bad.jsonl"
    quarantine.write_text("of an earlier run\n")
    with pytest.raises(RuntimeError), BadRows(quarantine) as bad:  # noqa: PT012
        bad.add("a", 1, "broken JSON")
        raise RuntimeError
    assert quarantine.read_text() == "of an earlier run\n"
    with BadRows(quarantine):
        pass
    assert list(tmp_path.iterdir()) == []


def test_blank_lines_marks_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b", "score": NaN}')
    bad = BadRows()
    documents = list(iterate_documents([path], bad_rows=bad))
    assert [(d.text, d.line) for d in documents] == [("a", 1), ("b", 4)]
    assert bad.total == 0


def test_several_keys_come_together_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q-1": "a", "text": "b", "x": 1}\n{"q-1": "a"}\n')
    reader = RowReader([path], ["text", "q-1"])
    assert [row.texts for row in reader] == [("b", "a")]
    assert reader.bad_rows.counts == {"missing key": 1}


def test_progress_ends_at_the_size_of_the_inputs(tmp_path: Path) -> None:
    for suffix in ("", ".gz"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](jsonl(TEXTS * 5000)))
    reader = RowReader([tmp_path])
    seen = [reader.bytes_done for _ in reader]
    assert seen == sorted(seen)
    assert reader.bytes_done == reader.bytes_total == sum(reader.sizes.values())


@given(st.lists(st.binary(max_size=40)))
def test_no_bytes_whatever_break_the_reader(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + jsonl(["last"]))
    assert list(iterate_documents([path]))[-1].text == "last"
