"""Exporting a checkpoint, and finding an export where it was made.

The reader of our own checkpoints has its tests in ``test_store.py``; here it is a dictionary.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from phi1_megatron.checkpoint import export as export_module
from phi1_megatron.checkpoint.convert import megatron_to_huggingface
from phi1_megatron.checkpoint.export import export_checkpoint, exported_folder
from phi1_megatron.checkpoint.folder import Progress, checkpoint_path, write_run_file
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import CheckpointError


class DictReader:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def names(self) -> list[str]:
        return list(self.weights)

    def read(self, name: str) -> Tensor:
        return self.weights[name]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in expected_shapes(config(Path()).model).items()
    }


@pytest.fixture
def run_dir(tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    train_bpe(["def f():\n    pass\n"] * 4, vocab_size=300).save(tmp_path / "tokenizer")
    for step in (10, 20):
        checkpoint = checkpoint_path(run, step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(str(step))
        write_run_file(checkpoint, Progress(step, step * 4, "tp1"), config(tmp_path))
    lines = [
        {"step": step, "loss": 9.0 - step / 10, "consumed_tokens": step * 64}
        for step in range(1, 31)
    ]
    lines[9]["validation_loss"] = 7.5
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 31, "lo')
    monkeypatch.setattr(export_module, "open_weights", lambda _: DictReader(weights))
    return run


def config(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 48,
                "vocab_size": 300,
                "make_vocab_size_divisible_by": 64,
                "max_position_embeddings": 64,
            },
            "data": {
                "blend": ["somewhere/stdlib"],
                "seq_length": 16,
                "tokenizer": str(folder / "tokenizer"),
            },
            "scheduler": {"warmup_steps": 0},
            "training": {"train_steps": 40, "global_batch_size": 4, "micro_batch_size": 2},
        }
    )


def test_the_newest_checkpoint_is_exported_and_compared_with_megatron_core(
    run_dir: Path, weights: dict[str, Tensor]
) -> None:
    made = export_checkpoint(run_dir, run_dir.parent / "out")
    assert made.checkpoint.name == "step_00000020"
    assert made.num_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert made.comparison is not None
    assert made.comparison.max_rel_difference < 1e-5
    state = AutoModelForCausalLM.from_pretrained(made.target).state_dict()
    for name, tensor in megatron_to_huggingface(weights, config(Path()).model):
        assert torch.equal(state[name], tensor)


def test_rounding_to_a_smaller_type_is_no_difference(run_dir: Path) -> None:
    made = export_checkpoint(run_dir, run_dir.parent / "out", dtype=torch.bfloat16)
    assert made.comparison is not None
    assert made.comparison.max_rel_difference < 1e-5


def test_an_export_that_differs_is_not_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi1_megatron.models import phi1

    whole = phi1.reference_forward
    monkeypatch.setattr(
        phi1, "reference_forward", lambda *given: lambda tokens: whole(*given)(tokens) + 0.01
    )
    with pytest.raises(CheckpointError, match="logits differ"):
        export_checkpoint(run_dir, run_dir.parent / "out")
    assert not (run_dir.parent / "out").exists()
    assert export_checkpoint(run_dir, run_dir.parent / "out", verify=False).comparison is None


def test_the_card_holds_the_metrics_of_the_checkpoints_step(run_dir: Path) -> None:
    made = export_checkpoint(run_dir, run_dir.parent / "out", verify=False)
    card = (made.target / "README.md").read_text()
    for said in ("| loss | 7 |", "| validation loss | 7.5 |", "| consumed tokens | 1280 |"):
        assert said in card
    assert "- `stdlib`" in card
    assert "global_batch_size = 4" in card


def test_a_checkpoint_of_other_weights_is_refused_by_name(
    run_dir: Path, weights: dict[str, Tensor]
) -> None:
    del weights["output_layer.bias"]
    with pytest.raises(CheckpointError, match=r"output_layer\.bias"):
        export_checkpoint(run_dir, run_dir.parent / "out")


def test_the_export_in_the_run_folder_is_made_once_for_each_state_of_a_checkpoint(
    run_dir: Path,
) -> None:
    calls: list[int] = []
    first = exported_folder(run_dir, on_progress=lambda done, _: calls.append(done))
    assert first.parent == run_dir / "exports"
    assert first.name.startswith("step_00000020-")
    assert calls
    calls.clear()
    assert exported_folder(run_dir, on_progress=lambda done, _: calls.append(done)) == first
    assert not calls
    assert exported_folder(first) == first
    os.utime(checkpoint_path(run_dir, 20) / "weights", (1, 1))  # written again: other weights
    assert exported_folder(run_dir) != first


def test_what_is_neither_run_nor_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint or run folder"):
        exported_folder(tmp_path / "nowhere")
