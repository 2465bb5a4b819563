"""The bytes that Megatron-LM's own preprocess_data.py writes, recorded as hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from phi1_megatron.data.definition import codegen_definition, gpt2_definition
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from tests.data import megatron_lm_corpus

CORPUS = "f986bf6d8e82a293569e2f98194fc938d8c21ac4f0929b5535100514146b04da"
MEGATRON_LM = {
    ("gpt2", "text.bin"): "6f55767c7d1f893d2bea6d2bd25ad3587aac4ca10ff1ff50d9175b5fb12aa9e6",
    ("gpt2", "text.idx"): "b97922aa78fa0fb6730c66600d8a1da7a881afde91d062358ca57510fc30b0af",
    ("gpt2", "notes.bin"): "2c91cdb7cb758a9309bed7f2057fc4db626ed4c9b02fb8b936096176fa45318b",
    ("gpt2", "notes.idx"): "01bdacaac37d34ce45a5ad6fadfee4f87ccbdf3cc12236c9d3455574eb02d192",
    ("codegen", "text.bin"): "33be41078a7d566c110162f051202a3ec4379988567c251f80b62ba6644cd52c",
    ("codegen", "text.idx"): "cf4fc8d1d46808a870af0ebcc0a94adc21c13cac27cb4be5aa4629315b79b4ab",
    ("codegen", "notes.bin"): "0b3abd751f2fafeafb2a7dbe4e293950edd41ea3f35eacf027aa9dff5c9e3f69",
    ("codegen", "notes.idx"): "01bdacaac37d34ce45a5ad6fadfee4f87ccbdf3cc12236c9d3455574eb02d192",
}


@pytest.mark.parametrize("engine", ["auto", "fastokens", "huggingface"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tokenizer", ["gpt2", "codegen"])
def test_every_byte_is_megatron_lm_s(
    tmp_path: Path, shared_data: Path, tokenizer: str, workers: int, engine: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(megatron_lm_corpus.lines()) + "\n", encoding="utf-8")
    made = hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert made == CORPUS, "this Python draws another corpus: nothing can be compared"
    build = gpt2_definition if tokenizer == "gpt2" else codegen_definition
    files = shared_data / "tokenizer"
    preprocess(
        PreprocessOptions(
            inputs=(str(corpus),),
            output_prefix=tmp_path / "x",
            tokenizer=build(files / "vocab.json", files / "merges.txt"),
            append_eod=True,
            json_keys=("text", "notes"),
            workers=workers,
            engine=engine,  # type: ignore[arg-type]
            shard_bytes=100_000,
        )
    )
    for (of_tokenizer, file), digest in MEGATRON_LM.items():
        if of_tokenizer == tokenizer:
            key, suffix = file.split(".")
            written = (tmp_path / f"x_{key}_document.{suffix}").read_bytes()
            assert hashlib.sha256(written).hexdigest() == digest, file
