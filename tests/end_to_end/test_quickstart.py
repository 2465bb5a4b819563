"""``phi1 quickstart`` from the interpreter's own library to completions, cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi1_megatron.data.report import read_report

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end]

SHORT = ("training.train_steps=50", "training.eval_interval=25", "training.eval_steps=1")


def quickstart(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "phi1_megatron",
            "quickstart",
            *SHORT,
            *words,
            "--folder",
            str(folder),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "80"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quick") / "start here"
    done = quickstart(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_loss_falls_below_the_unigram_entropy_of_the_corpus(
    finished: tuple[Path, str],
) -> None:
    folder, _ = finished
    report = read_report(folder / "data" / "corpus_text_document")
    assert report is not None
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line["loss"] for line in lines[-10:]]
    assert sum(last) / len(last) < report.unigram_entropy_nats - 0.3
    assert lines[-1]["validation_loss"] < report.unigram_entropy_nats - 0.3


def test_every_stage_and_a_summary_are_shown_within_80_columns(
    finished: tuple[Path, str],
) -> None:
    folder, output = finished
    for stage in ("Corpus", "Tokenizer", "Preprocess", "Train", "Export", "Generate"):
        assert f"/6 {stage}" in output
    assert "largest logit difference to transformers" in output
    told, _, rest = output.partition("6/6 Generate")
    summary = rest[rest.rindex("Quickstart") :]
    # Paths are printed whole, however long they are; so is what the model wrote.
    wide = [line for line in told.splitlines() if len(line) > 80 and str(folder) not in line]
    assert wide == []
    assert all(len(line) <= 80 for line in summary.splitlines())


def test_transformers_loads_what_was_exported_and_predicts_code(
    finished: tuple[Path, str],
) -> None:
    exported = finished[0] / "huggingface"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    tokens = tokenizer("import os\nimport sys\n\n\ndef main(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert loss < 7.0  # a uniform guess over 4,096 tokens costs 8.3 nats


def test_a_second_quickstart_goes_on_from_what_is_there(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    again = quickstart(folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[Path, str]) -> None:
    refused = quickstart(finished[0], "model.num_layers=2")
    assert refused.returncode == 2
    assert "--fresh" in refused.stderr
