"""Something to tokenize on every machine: the Python sources that are installed on it.

The running interpreter's standard library and site-packages, tests and all: the larger and the more
varied, the better. :mod:`phi1_megatron.data.corpus` makes the one to train on.
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi1_megatron.errors import DataError

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class InputFacts:
    """A JSONL file as the measurements see it.

    Attributes
    ----------
    text_bytes
        UTF-8 bytes of all ``text`` fields: what MB/s counts.
    sha256
        Of the file.
    """

    path: Path
    documents: int
    text_bytes: int
    file_bytes: int
    sha256: str

    @property
    def megabytes(self) -> float:
        """Text in millions of bytes."""
        return self.text_bytes / MEGABYTE


class _Row(msgspec.Struct):
    text: str


def source_folders() -> dict[str, Path]:
    """Where this interpreter's Python sources lie: label → folder, those that are there."""
    places = {
        "stdlib": [sysconfig.get_path("stdlib")],
        "site-packages": [*site.getsitepackages(), sysconfig.get_path("purelib")],
        "base-site-packages": [
            sysconfig.get_path("purelib", vars={"base": sys.base_prefix}),
        ],
    }
    folders: dict[str, Path] = {}
    for label, names in places.items():
        for number, folder in enumerate(dict.fromkeys(Path(name).resolve() for name in names)):
            if folder.is_dir() and folder not in folders.values():
                folders[f"{label}-{number}" if number else label] = folder
    return folders


def write_python_corpus(
    path: Path,
    megabytes: float,
    folders: Mapping[str, Path] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> InputFacts:
    """Write installed Python sources as JSONL, each content once, until ``megabytes`` of text.

    The order is by a hash of each file's label and path, so the same installation gives the same
    bytes and any beginning is a fair sample. Fewer megabytes are written where there are no more.

    Parameters
    ----------
    path
        The file to write.
    megabytes
        Millions of bytes of text to stop at.
    folders
        Label → folder to search; :func:`source_folders` by default.
    on_progress
        Called with the megabytes written.

    Raises
    ------
    DataError
        There is no Python source, or the file cannot be written.
    """
    sources = dict(_python_files(source_folders() if folders is None else folders))
    names = sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest())
    seen: set[bytes] = set()
    text_bytes = 0
    try:
        with path.open("w", encoding="utf-8") as out:
            for name in names:
                if text_bytes >= megabytes * MEGABYTE:
                    break
                text = _new_text(sources[name], seen)
                if text is not None:
                    out.write(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
                    text_bytes += len(text.encode())
                    if on_progress is not None:
                        on_progress(text_bytes / MEGABYTE)
    except OSError as error:
        raise DataError(
            f"the corpus {path} could not be written: {error.strerror or error}."
        ) from error
    if not text_bytes:
        raise DataError("no Python sources were found on this machine; give --input.")
    return read_input(path)


def _python_files(folders: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """``label/path`` → file, each real file once: a standard library may hold site-packages."""
    seen: set[Path] = set()
    for label, folder in folders.items():
        for here, subfolders, files in os.walk(folder):
            subfolders.sort()
            for name in sorted(files):
                file = Path(here, name)
                if name.endswith(".py") and file.is_file() and (real := file.resolve()) not in seen:
                    seen.add(real)
                    yield f"{label}/{file.relative_to(folder).as_posix()}", file


def _new_text(file: Path, seen: set[bytes]) -> str | None:
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (PermissionError, UnicodeDecodeError):
        return None
    digest = hashlib.sha256(content).digest()
    if not text.strip() or digest in seen:
        return None
    seen.add(digest)
    return text


def read_input(path: Path) -> InputFacts:
    """Read a JSONL file through and through, which also puts it into the page cache.

    Raises
    ------
    DataError
        The file cannot be read, or a line of it is one that some contender would stumble over.
    """
    decoder = msgspec.json.Decoder(_Row)
    digest = hashlib.sha256()
    documents = text_bytes = 0
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                text_bytes += len(decoder.decode(line).text.encode())
                documents += 1
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror or error}.") from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise DataError(
            f"{path} line {documents + 1:,} is not a JSON object with a text ({error}); a "
            "benchmark needs plain JSONL that every contender reads to its end."
        ) from error
    if not text_bytes:
        raise DataError(f"{path} holds no text; there is nothing to measure.")
    return InputFacts(path, documents, text_bytes, path.stat().st_size, digest.hexdigest())


def write_beginning(whole: InputFacts, path: Path, megabytes: float) -> InputFacts:
    """Copy the first documents of ``whole``, at least one, until ``megabytes`` of the file."""
    copied = 0
    with whole.path.open("rb") as source, path.open("wb") as out:
        for line in source:
            out.write(line)
            copied += len(line)
            if copied >= megabytes * MEGABYTE:
                break
    return read_input(path)
