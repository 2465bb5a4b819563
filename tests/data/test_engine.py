"""Every engine gives Hugging Face's ids, whatever the text."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

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
from phi1_megatron.data.sample_check import SampleCheck
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


@pytest.fixture(scope="module", params=["trained", "codegen", "gpt2"])
def definition(request: pytest.FixtureRequest, trained: TokenizerDefinition) -> TokenizerDefinition:
    if request.param == "trained":
        return trained
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
@settings(deadline=None, max_examples=150)
@given(texts=BATCHES)
def test_any_batch_of_texts_gets_the_reference_s_ids(
    texts: list[str], literal_eod: str, definition: TokenizerDefinition
) -> None:
    assert_same(replace(definition, literal_eod=literal_eod), texts)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=100)
@given(texts=BATCHES, window=st.integers(1, 40))
def test_windows_of_any_size_mark_the_same(
    texts: list[str], window: int, trained: TokenizerDefinition
) -> None:
    form = marked_codegen.derive(msgspec.json.decode(trained.content))
    assert form is not None
    expected = form.mark(texts) if texts else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marked_codegen, "_WINDOW", window)
        assert (form.mark(texts) if texts else None) == expected


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


def test_tokenizers_of_another_shape_are_not_marked(trained: TokenizerDefinition) -> None:
    content = msgspec.json.decode(trained.content)
    assert marked_codegen.derive(content) is not None
    changes = [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}},
        {"added_tokens": content["added_tokens"][:-1]},
        {"added_tokens": [{**content["added_tokens"][0], "rstrip": True}]},
        {"model": {**content["model"], "ignore_merges": True}},
    ]
    for change in changes:
        assert marked_codegen.derive({**content, **change}) is None, change


def test_a_tokenizer_that_fastokens_does_not_know_falls_back_or_is_refused_by_name() -> None:
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "<eos>": 2, "?": 3}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    definition = from_json(json.loads(words.to_str()), "words")
    assert open_engine(definition).encode(["a b", "", "b z"]).ids.tolist() == [0, 1, 1, 3]
    assert open_engine(definition).name.startswith("tokenizers")
    with pytest.raises(DataError, match="fastokens does not know the tokenizer words"):
        open_engine(definition, "fastokens")


def test_opening_a_quick_engine_starts_no_thread_so_that_workers_can_be_forked(
    trained: TokenizerDefinition, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.content)
    script = (
        "from phi1_megatron.data.definition import load_definition\n"
        "from phi1_megatron.data.engine import open_engine\n"
        "from phi1_megatron.data.worker_pool import runs_one_thread\n"
        f"definition = load_definition({str(tmp_path)!r})\n"
        "opened = [open_engine(definition, choice) for choice in ('auto', 'fastokens')]\n"
        "print(runs_one_thread())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "True"


def test_a_wrong_id_is_found_and_shown_with_the_text_around_it(
    trained: TokenizerDefinition,
) -> None:
    check = SampleCheck(trained)
    ids = engine(trained, "huggingface").encode(["def f0(x):\n        return x"]).ids
    check.compare("def f0(x):\n        return x", ids, "corpus.jsonl")
    assert check.documents == 1
    wrong = ids.copy()
    wrong[3] += 1
    with pytest.raises(DataError, match=rf"corpus\.jsonl.*token 3 is {wrong[3]}, not {ids[3]}"):
        check.compare("def f0(x):\n        return x", wrong, "corpus.jsonl")
    with pytest.raises(DataError, match="is none, not"):
        check.compare("def f0(x):\n        return x", ids[:-1], "corpus.jsonl")
