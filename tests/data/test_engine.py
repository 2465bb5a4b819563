"""Every engine gives Hugging Face's ids, whatever the text."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.data import marked_codegen
from phi1_megatron.data.definition import (
    TokenizerDefinition,
    codegen_definition,
    from_json,
    gpt2_definition,
)
from phi1_megatron.data.engine import Engine, open_engine
from phi1_megatron.data.tokenizer import codegen_tokenizer, gpt2_tokenizer, train_bpe
from phi1_megatron.errors import DataError

TEXTS = [f"def f{n}(x):\n        return x * {n}\n\n\n\t\tpass  # {n}\n" for n in range(300)]

# What the marks, the joins and the regular expression could trip over, and ordinary characters.
PIECES = st.one_of(
    st.integers(1, 70).map(lambda n: " " * n),
    st.integers(1, 21).map(lambda n: "\t" * n),
    st.sampled_from(
        ["\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x0c\x0c", "\0", "\u2003", "\u3000", "\x85",
         "\xa0", "'s", "'ll", "'", "\u0378", "e\u0301", "\u200b", "<|endoftext|>", "<|endof",
         "世界", "😀", "return", "(", ")", "_", "1", "42", " x", " ("],
    ),
    st.text(max_size=4),
)  # fmt: skip
BATCHES = st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=6)


@pytest.fixture(scope="module")
def trained() -> TokenizerDefinition:
    return train_bpe(TEXTS, 400).definition


@pytest.fixture(scope="module")
def with_marks_in_merges(trained: TokenizerDefinition) -> TokenizerDefinition:
    """A tokenizer whose merges come first and hold the bytes that marking uses, and tabs."""
    content = msgspec.json.decode(trained.content)
    space, mark, dropped, newline, tab = "\u0120", "\u010b", "\u010c", "\u010a", "\u0109"
    merges = [[space, mark], [mark, dropped], [newline, dropped], [dropped, newline], [tab, tab]]
    vocab = content["model"]["vocab"]
    content["model"]["merges"][:0] = merges
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    for token in content["added_tokens"]:
        token["id"] += len(merges)
    return from_json(content, "marks in merges")


@pytest.fixture(scope="module")
def with_end_token_last(trained: TokenizerDefinition) -> TokenizerDefinition:
    """A tokenizer whose end-of-document token has the highest id."""
    content = msgspec.json.decode(trained.content)
    first, *others = content["added_tokens"]
    ids = range(first["id"], trained.vocab_size)
    content["added_tokens"] = [
        {**token, "id": i} for token, i in zip([*others, first], ids, strict=True)
    ]
    return from_json(content, "end token last")


@pytest.fixture(
    scope="module",
    params=["trained", "with_marks_in_merges", "with_end_token_last", "codegen", "gpt2"],
)
def definition(request: pytest.FixtureRequest) -> TokenizerDefinition:
    if request.param not in ("codegen", "gpt2"):
        named: TokenizerDefinition = request.getfixturevalue(request.param)
        return named
    files = request.getfixturevalue("shared_data") / "tokenizer"
    build = codegen_definition if request.param == "codegen" else gpt2_definition
    return build(files / "vocab.json", files / "merges.txt")


_OPEN: dict[tuple[str, str, str], Engine] = {}


def engine(definition: TokenizerDefinition, choice: str) -> Engine:
    key = (definition.fingerprint, definition.literal_eod, choice)
    if key not in _OPEN:
        _OPEN[key] = open_engine(definition, choice)  # type: ignore[arg-type]
    return _OPEN[key]


def assert_same(definition: TokenizerDefinition, texts: list[str]) -> None:
    expected = engine(definition, "huggingface").encode(texts)
    assert expected.lengths.sum() == expected.ids.size
    for choice in ("auto", "fastokens"):
        found = engine(definition, choice).encode(texts)
        assert found.ids.dtype == expected.ids.dtype
        assert found.lengths.tolist() == expected.lengths.tolist(), choice
        assert found.ids.tolist() == expected.ids.tolist(), choice


@pytest.mark.parametrize("literal_eod", ["eod", "text"])
@settings(deadline=None, max_examples=100)
@given(texts=BATCHES)
def test_any_batch_of_texts_gets_the_reference_s_ids(
    texts: list[str], literal_eod: str, definition: TokenizerDefinition
) -> None:
    assert_same(replace(definition, literal_eod=literal_eod), texts)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=100)
@given(texts=BATCHES, window=st.integers(1, 40))
def test_windows_of_any_size_give_the_same_ids(
    texts: list[str], window: int, trained: TokenizerDefinition
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marked_codegen, "_WINDOW", window)
        assert_same(trained, texts)


def test_runs_of_any_length_are_the_tokens_that_the_reference_finds(
    definition: TokenizerDefinition,
) -> None:
    for n in [*range(1, 36), 61, 62, 63, 64, 93, 94, 1000]:
        run, tabs = " " * n, "\t" * n
        texts = [f"{before}{run}{after}" for before in ("", "a", "\n") for after in ("", "b", "\n")]
        texts += [
            f"{before}{tabs}{after}" for before in ("", "a", "\n") for after in ("", "b", "\n")
        ]
        texts += [f"{run}'s{run}", f"{run}<|endoftext|>{run}", f"{tabs}<|endoftext|>{tabs}"]
        texts += [run + tabs + run, tabs + run + tabs]
        assert_same(definition, texts)
        assert_same(replace(definition, literal_eod="text"), texts)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "  ", "", "a  b", ""],
        [" ", " ", "  "],
        ["\t", "\t\t", "\t"],
        ["a  ", "\x0c  b", "\x0c", "  \x0c", "\x0c\x0c"],
        ["a  b", "\x0b  c", "d    e", "f\x0b\x0c", "", "g  h"],
        ["\x0b", "\x0b"],
        ["\0  \0", "  \0"],
    ],
)
def test_batches_keep_their_texts_apart_and_in_order(
    texts: list[str], definition: TokenizerDefinition
) -> None:
    assert_same(definition, texts)


def test_real_source_code_gets_the_reference_s_ids(definition: TokenizerDefinition) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))[::6] + sorted(folder.glob("idlelib/*.py"))[::9]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert sum(map(len, texts)) > 300_000
    assert_same(definition, texts)


def test_codegen_gets_the_ids_on_which_all_references_agree(shared_data: Path) -> None:
    files = shared_data / "tokenizer"
    vectors = json.loads((files / "codegen_test_vectors.json").read_text(encoding="utf-8"))
    cases = vectors["vectors"]
    assert len(cases) == 30
    texts = [case["text"] for case in cases]
    definition = codegen_definition(files / "vocab.json", files / "merges.txt")
    found = engine(definition, "auto")
    assert "marked" in found.name
    encoded = found.encode(texts)
    parts = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    for case, part in zip(cases, parts, strict=True):
        assert part.tolist() == case["ids"], case["text"]


def test_definitions_are_what_the_tokenizers_library_would_write(shared_data: Path) -> None:
    files = shared_data / "tokenizer"
    for build, reference in (
        (gpt2_definition, gpt2_tokenizer),
        (codegen_definition, codegen_tokenizer),
    ):
        ours = build(files / "vocab.json", files / "merges.txt")
        written = reference(files / "vocab.json", files / "merges.txt").to_json()
        assert msgspec.json.decode(ours.content) == json.loads(written)


@pytest.mark.parametrize("literal_eod", ["eod", "text"])
def test_tokenizers_of_codegen_s_shape_are_marked(
    literal_eod: str, trained: TokenizerDefinition, with_end_token_last: TokenizerDefinition
) -> None:
    for shaped in (trained, with_end_token_last):
        opened = engine(replace(shaped, literal_eod=literal_eod), "auto")  # type: ignore[arg-type]
        assert opened.name == f"fastokens {version('fastokens')}, marked"


def test_tokenizers_of_another_shape_are_not_marked(trained: TokenizerDefinition) -> None:
    content = msgspec.json.decode(trained.content)
    assert marked_codegen.derive(content) is not None
    model, (end, *runs) = content["model"], content["added_tokens"]
    vocab: dict[str, int] = model["vocab"]
    extra = {**end, "content": "x", "id": trained.vocab_size}
    changes: list[dict[str, Any]] = [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": {**content["pre_tokenizer"], "use_regex": False}},
        {"added_tokens": [end, *runs[:-1]]},
        {"added_tokens": [{**end, "rstrip": True}, *runs]},
        {"added_tokens": [end, *runs[:-1], {**runs[-1], "single_word": True}]},
        {"added_tokens": [end, *runs[:-1], {**runs[-1], "special": True}]},
        {"added_tokens": [end, *runs, {**extra, "special": False}]},
        {"added_tokens": [end, *runs, {**extra, "content": "a b"}]},
        {"added_tokens": [end, *runs, {**extra, "id": trained.vocab_size + 7}]},
        {"model": {**model, "ignore_merges": True}},
        {"model": {**model, "vocab": {**vocab, "x y": vocab["a"]}}},
        *(
            {"model": {**model, "vocab": {t: i for t, i in vocab.items() if t != byte}}}
            for byte in ("\u0120", "\u010b", "\u010c", "\u0109")
        ),
    ]
    for change in changes:
        assert marked_codegen.derive({**content, **change}) is None, change
    assert marked_codegen.derive({**content, "added_tokens": [end, *runs, extra]}) is not None


def test_a_tokenizer_that_fastokens_does_not_know_falls_back_or_is_refused_by_name() -> None:
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2, "?": 3}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    definition = from_json(json.loads(words.to_str()), "words")
    assert open_engine(definition).encode(["a b", "", "b z"]).ids.tolist() == [0, 1, 1, 3]
    assert open_engine(definition).name.startswith("tokenizers")
    with pytest.raises(DataError, match="fastokens does not know the tokenizer words"):
        open_engine(definition, "fastokens")


@pytest.mark.parametrize("choice", ["auto", "fastokens", "huggingface"])
def test_engines_start_no_thread_so_that_workers_can_be_forked(
    choice: str, trained: TokenizerDefinition, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.content)
    script = (
        "from os import listdir\n"
        "from phi1_megatron.data.definition import load_definition\n"
        "from phi1_megatron.data.engine import open_engine\n"
        f"engine = open_engine(load_definition({str(tmp_path)!r}), {choice!r})\n"
        "opened = len(listdir('/proc/self/task'))\n"
        "engine.encode(['def f(x):\\n    return x\\n', '\\x0b  '] * 500)\n"
        "print(opened, len(listdir('/proc/self/task')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.split() == ["1", "1"]
