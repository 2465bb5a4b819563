#!/bin/sh
# A folder of source files to JSONL, one document a file: {"text": ..., "path": ...}.
#
#   sh examples/code_to_jsonl.sh FOLDER OUTPUT.jsonl [ENDING ...]        ENDING: .py by default
#
# Empty files, files that are not UTF-8 and copies of a file already taken are left out and counted.
# The order is fixed by a hash of each file's path: the last documents, which a recipe's data.split
# keeps for validation, are a fair sample of all of them.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: sh examples/code_to_jsonl.sh FOLDER OUTPUT.jsonl [ENDING ...]" >&2
    exit 2
fi

"${PYTHON:-python3}" - "$@" <<'PYTHON_SCRIPT'
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
endings = tuple(sys.argv[3:]) or (".py",)
if not folder.is_dir():
    sys.exit(f"code_to_jsonl: there is no folder {folder}")
files = [path for path in folder.rglob("*") if path.name.endswith(endings) and path.is_file()]
files.sort(key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())
counts, seen = Counter(), set()
partial = output.with_name(f"{output.name}.partial")
output.parent.mkdir(parents=True, exist_ok=True)
with partial.open("w", encoding="utf-8") as lines:
    for path in files:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            counts["not UTF-8"] += 1
            continue
        if not text.strip() or digest in seen:
            counts["copies" if digest in seen else "empty"] += 1
            continue
        seen.add(digest)
        counts["taken"] += 1
        row = {"text": text, "path": path.relative_to(folder).as_posix()}
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
if not counts["taken"]:
    partial.unlink()
    sys.exit(f"code_to_jsonl: {folder} holds no text in files ending in {', '.join(endings)}")
os.replace(partial, output)
print(f"{output}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
PYTHON_SCRIPT
