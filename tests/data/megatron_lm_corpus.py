"""A corpus that is the same everywhere, on which Megatron-LM's own tool was run.

``python -m tests.data.megatron_lm_corpus FILE`` writes it. The hashes in
``test_megatron_lm_bytes.py`` are of what Megatron-LM at d98e8a64 made of it:

    python tools/preprocess_data.py --input FILE --output-prefix OUT --workers 2 --append-eod \
        --json-keys text notes --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER

where FOLDER is what ``gpt2_tokenizer(vocab, merges).save`` or ``codegen_tokenizer(...).save``
wrote.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

_NAMES = ["self", "value", "result", "index", "for", "in", "return", "not", "None", "True", "list"]
_WORDS = [*_NAMES, "dict", "Ünïcödé", "世界", "naïve", "😀"]


def lines() -> list[str]:
    """800 rows of code-like text with everything that tokenizers trip over."""
    draw = random.Random(1306_11644)
    rows = []
    for number in range(800):
        parts = [f'def function_{number}(a, b):\n    """Doc {draw.choice(_WORDS)}."""\n']
        for _ in range(draw.randrange(40)):
            indent = draw.choice(["    ", "        ", "\t", "\t\t", " " * draw.randrange(2, 70)])
            words = " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(8)))
            parts.append(f"{indent}{words} = {draw.randrange(10**6)}  # it's {draw.random()}\n")
            if draw.random() < 0.05:
                parts.append(draw.choice(["\r\n", "\x0c\n", "\n\n\n", "<|endoftext|>", "\t" * 12]))
        row = {"text": "".join(parts), "notes": f"row {number}\n\n{draw.choice(_WORDS)}  end"}
        rows.append(json.dumps(row, ensure_ascii=bool(number % 2)))
    return rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(lines()) + "\n", encoding="utf-8")
