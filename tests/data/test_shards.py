"""Cutting inputs into shards: whatever the cuts, the same rows in the same order."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.data.documents import BadRows, RowReader
from phi1_megatron.data.inputs import Damaged, DamageError, Lines, TooLong, blocks_of_lines
from phi1_megatron.data.rows import RowParser
from phi1_megatron.data.shard_reader import StretchReader
from phi1_megatron.data.shards import Shard, hash_stretch, plan, shards

Rows = tuple[list[str], list[tuple[str, int, str]]]

LINES = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
        st.text(max_size=30)
        .map(lambda text: json.dumps({"text": text}, ensure_ascii=False))
        .map(lambda line: line.encode(errors="replace")),
        st.sampled_from(
            [b"", b"{}", b"nonsense", b'{"text": 1}', b'{"text": "\xff"}', b"\r", b" "]
        ),
    ),
    max_size=40,
)


def read_all(files: list[Path], folder: Path, workers: int, shard_bytes: int) -> Rows:
    """The texts, and (input, line, reason) of the bad rows, as shards give them."""
    sizes = {str(path): path.stat().st_size for path in files}
    planned = plan(sizes, list(sizes), ("text",), workers, shard_bytes)
    texts: list[str] = []
    bad: list[tuple[str, int, str]] = []
    before: dict[str, int] = {}
    for shard in shards(planned, folder):
        for stretch in shard.stretches:
            reader = StretchReader(stretch, RowParser(("text",)), 1 << 20)
            for (column,) in reader:
                texts += column
            base = before.get(stretch.source, 0)
            bad += [(stretch.source, base + line, why.reason) for line, why in reader.bad]
            before[stretch.source] = base + reader.lines
            assert reader.digest == hash_stretch(stretch)
    return texts, bad


def read_plainly(files: list[Path], folder: Path) -> Rows:
    quarantine = folder / "plain.jsonl"
    with BadRows(quarantine) as rows:
        texts = [row.texts[0] for row in RowReader(files, ("text",), rows)]
    listed = quarantine.read_text().splitlines() if quarantine.exists() else []
    found = [json.loads(line) for line in listed]
    return texts, [(row["input"], row["line"], row["reason"]) for row in found]


@settings(deadline=None, max_examples=60)
@given(files=st.lists(LINES, min_size=1, max_size=4), shard_bytes=st.integers(1, 200))
def test_shards_of_any_size_give_the_rows_and_the_bad_lines_of_one_reading(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    paths = []
    for number, lines in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b"\n".join(lines))
        paths.append(path)
    assert read_all(paths, folder, 2, shard_bytes) == read_plainly(paths, folder)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_a_large_compressed_file_is_handed_out_in_pieces_that_join_to_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    pack: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr("phi1_megatron.data.shards._STREAMED_FROM", 100)
    monkeypatch.setattr("phi1_megatron.data.shards._PIECE_BYTES", 5000)
    monkeypatch.setattr("phi1_megatron.data.shards._READ_BYTES", 700)
    lines = [json.dumps({"text": f"{n} " * (n % 50 + 1)}) for n in range(500)]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack("\n".join([*lines, "nonsense", "x" * 9000, *lines]).encode()))
    pieces = list(shards(plan({str(path): 10**6}, [str(path)], ("text",), 2), tmp_path))
    assert len(pieces) > 10
    assert read_all([path], tmp_path, 2, 1000) == read_plainly([path], tmp_path)


def test_damage_in_a_streamed_file_loses_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi1_megatron.data.shards._STREAMED_FROM", 100)
    monkeypatch.setattr("phi1_megatron.data.shards._PIECE_BYTES", 5000)
    text = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(20_000)).encode()
    packed = gzip.compress(text)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    texts, bad = read_all([path], tmp_path, 2, 1000)
    assert len(texts) > 5000
    assert texts == [f"row {n}" for n in range(len(texts))]
    assert bad == [(str(path), len(texts) + 1, "truncated or damaged compression")]
    assert (texts, bad) == read_plainly([path], tmp_path)


def test_parquet_is_cut_at_row_groups_and_every_byte_is_hashed_once(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {n}" * (n % 7 + 1) for n in range(1000)]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"other": list(range(1000)), "text": texts})
    parquet.write_table(table, path, row_group_size=90)
    size = path.stat().st_size
    planned = plan({str(path): size}, [str(path)], ("text",), 2, size // 5)
    stretches = [stretch for item in planned for stretch in item.stretches]
    assert len(stretches) > 3
    assert [s.start for s in stretches] == [0, *(s.end for s in stretches[:-1])]
    assert stretches[-1].end == size
    assert read_all([path], tmp_path, 2, size // 5) == (texts, [])


def test_small_files_share_a_shard_and_progress_adds_up(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n:03d}.jsonl").write_text(json.dumps({"text": "x" * n}) + "\n")
    sizes = {str(path): path.stat().st_size for path in sorted(tmp_path.glob("*.jsonl"))}
    found: list[Shard] = list(shards(plan(sizes, list(sizes), ("text",), 2, 1000), tmp_path))
    assert len(found) < 15
    assert [s.source for shard in found for s in shard.stretches] == list(sizes)
    assert found[-1].bytes_done == sum(sizes.values())


def test_a_line_that_is_too_long_is_passed_over_and_its_neighbours_are_kept() -> None:
    data = b"a\n" + b"x" * 5000 + b"\nb\nc\n" + b"y" * 2000
    for block in (1, 7, 300, 10_000):
        found = list(blocks_of_lines(io.BytesIO(data), max_line_bytes=1000, block_bytes=block))
        kept = b"".join(part.data for part in found if isinstance(part, Lines))
        assert kept == b"a\nb\nc\n"
        assert [part.number for part in found if isinstance(part, TooLong)] == [2, 5]
        for part in found:
            if isinstance(part, Lines):
                assert data.split(b"\n")[part.first - 1] == part.data.split(b"\n")[0]


@settings(deadline=None)
@given(data=st.binary(max_size=400), block=st.integers(1, 50), fails=st.booleans())
def test_blocks_are_whole_lines_that_join_to_the_stream(
    data: bytes, block: int, fails: bool
) -> None:
    class Stream:
        position = 0

        def read(self, size: int = -1, /) -> bytes:
            if fails and self.position >= len(data):
                raise DamageError("torn")
            self.position += size
            return data[self.position - size : self.position]

    data = data.removeprefix(b"\xef\xbb\xbf")
    found = list(blocks_of_lines(Stream(), block_bytes=block, at_start=False))
    joined = b"".join(part.data for part in found if isinstance(part, Lines))
    assert joined == (data[: data.rfind(b"\n") + 1] if fails else data)
    assert all(p.data.endswith(b"\n") for p in found[: -1 - fails] if isinstance(p, Lines))
    numbers = [part.first for part in found if isinstance(part, Lines)]
    assert numbers == sorted(set(numbers))
    assert sum(isinstance(part, Damaged) for part in found) == fails
