"""A first corpus on every machine, without a download: the running Python's standard library.

Real, commented code under the PSF licence, one document a file. Tests, installed packages and
build residue stay out. The order is fixed by a hash of each file's path, so that the last few per
cent of the documents are a fair sample to validate on, and the same Python gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phi1_megatron.errors import DataError

_LICENSE = "PSF-2.0"
_LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
)
_LEFT_OUT_PREFIXES = ("test_", "_sysconfigdata_", "python-config")


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """What :func:`write_standard_library_corpus` wrote.

    Attributes
    ----------
    path
        The JSONL file.
    documents
        Lines in it.
    text_bytes
        UTF-8 bytes of all ``text`` fields.
    file_bytes
        Size of the file.
    left_out
        Python files not taken, by reason (empty, duplicate, not UTF-8).
    source
        For example ``CPython 3.11.7 standard library``.
    """

    path: Path
    documents: int
    text_bytes: int
    file_bytes: int
    left_out: dict[str, int]
    source: str


def write_standard_library_corpus(
    path: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
    root: str | Path | None = None,
) -> CorpusReport:
    """Write the standard library to ``path`` as JSONL: ``text``, ``path``, ``license``, ``source``.

    The file appears by rename, whole or not at all.

    Parameters
    ----------
    path
        The JSONL file to write; missing folders are made.
    on_progress
        Called with (files done, files in all).
    root
        The folder to read instead of the running interpreter's standard library.

    Raises
    ------
    DataError
        There is no Python source under the root, or the file cannot be written.
    """
    path = Path(path)
    root = Path(root or sysconfig.get_path("stdlib"))
    source = f"{platform.python_implementation()} {platform.python_version()} standard library"
    names = sorted(_python_files(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not names:
        raise DataError(f"{root} holds no Python source files; a corpus needs at least one.")

    left_out: Counter[str] = Counter()
    seen: set[bytes] = set()
    documents = text_bytes = 0
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as out:
            for done, name in enumerate(names, 1):
                content = (root / name).read_bytes()
                text = _text_or_reason(content, seen, left_out)
                if text is not None:
                    row = {"text": text, "path": name, "license": _LICENSE, "source": source}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    documents += 1
                    text_bytes += len(content)
                if on_progress is not None:
                    on_progress(done, len(names))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"the corpus {path} could not be written: {error.strerror or error}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return CorpusReport(
        path, documents, text_bytes, path.stat().st_size, dict(sorted(left_out.items())), source
    )


def _python_files(root: Path) -> Iterator[str]:
    """Paths below ``root``, with forward slashes, of the source files worth learning from."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(_LEFT_OUT_PREFIXES):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _text_or_reason(content: bytes, seen: set[bytes], left_out: Counter[str]) -> str | None:
    digest = hashlib.sha256(content).digest()
    if not content.strip():
        left_out["empty"] += 1
    elif digest in seen:
        left_out["duplicate"] += 1
    else:
        seen.add(digest)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            left_out["not UTF-8"] += 1
    return None
