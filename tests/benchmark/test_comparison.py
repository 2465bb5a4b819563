"""Byte for byte means every byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi1_megatron.benchmark.comparison import digests, first_difference, output_files

CONTENT = bytes(range(256)) * 8192  # two chunks of the comparison


def write(prefix: Path, bin_bytes: bytes = CONTENT, idx_bytes: bytes = b"index") -> Path:
    for path, content in zip(output_files(prefix), (bin_bytes, idx_bytes), strict=True):
        path.write_bytes(content)
    return prefix


def test_equal_files_have_no_difference(tmp_path: Path) -> None:
    ours, theirs = write(tmp_path / "a"), write(tmp_path / "b")
    assert first_difference(ours, theirs) is None
    assert digests(ours) == digests(theirs)
    assert set(digests(ours)) == {".bin", ".idx"}


@pytest.mark.parametrize("place", [0, 1234, (1 << 20) + 5, len(CONTENT) - 1])
def test_one_changed_byte_is_found_and_its_place_told(place: int, tmp_path: Path) -> None:
    changed = bytearray(CONTENT)
    changed[place] ^= 1
    found = first_difference(write(tmp_path / "a"), write(tmp_path / "b", bytes(changed)))
    assert found is not None
    assert f"the .bin differs from byte {place:,} on" in found


def test_a_missing_end_is_found(tmp_path: Path) -> None:
    found = first_difference(write(tmp_path / "a"), write(tmp_path / "b", CONTENT[:-2]))
    assert found is not None
    assert f"from byte {len(CONTENT) - 2:,} on" in found
    assert f"{len(CONTENT):,} bytes ours, {len(CONTENT) - 2:,} theirs" in found


def test_a_different_index_is_found_where_the_tokens_are_equal(tmp_path: Path) -> None:
    found = first_difference(write(tmp_path / "a"), write(tmp_path / "b", idx_bytes=b"indeX"))
    assert found is not None
    assert "the .idx differs from byte 4 on" in found
