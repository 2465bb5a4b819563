"""Folders written whole or not at all, and read with every fault named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from phi1_megatron.checkpoint import hf_folder, hf_weights
from phi1_megatron.checkpoint.convert import (
    export_huggingface,
    import_huggingface,
)
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe
from phi1_megatron.errors import CheckpointError, UsageError
from tests.checkpoint.tiny_phi import Weights, random_weights, tiny_model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["def add(a, b):\n    return a + b\n"] * 4
    return train_bpe(texts, vocab_size=298).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = tiny_model()
    folder = tmp_path / "exported"
    export_huggingface(random_weights(model).__getitem__, model, folder, tokenizer=None)
    return folder


def rewrite(folder: Path, change: Callable[[Weights], None]) -> None:
    """Change the weights of an exported folder with the safetensors library."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file)


# ---- whole or not at all


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny_model()
    weights = random_weights(model)
    weights["output_layer.bias"][5] = float("nan")
    with pytest.raises(CheckpointError, match=r"lm_head.bias holds NaN"):
        export_huggingface(weights.__getitem__, model, tmp_path / "out", tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_verification_leaves_the_earlier_export_as_it_was(exported: Path) -> None:
    before = (exported / "model.safetensors").read_bytes()
    model = tiny_model()

    def refuse(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise CheckpointError("no")

    other = {name: tensor + 1 for name, tensor in random_weights(model).items()}
    with pytest.raises(CheckpointError, match=r"^no$"):
        export_huggingface(
            other.__getitem__, model, exported, tokenizer=None, force=True, verify=refuse
        )
    assert (exported / "model.safetensors").read_bytes() == before
    assert list(exported.parent.iterdir()) == [exported]


def test_only_an_earlier_export_is_replaced_and_only_by_force(exported: Path) -> None:
    model = tiny_model()
    other = {name: tensor + 1 for name, tensor in random_weights(model).items()}
    with pytest.raises(UsageError, match="--force"):
        export_huggingface(other.__getitem__, model, exported, tokenizer=None)
    export_huggingface(other.__getitem__, model, exported, tokenizer=None, force=True)
    assert all(torch.equal(t, other[name]) for name, t in import_huggingface(exported)[1])
    (exported / hf_folder.MANIFEST).unlink()
    with pytest.raises(UsageError, match="is no earlier export"):
        export_huggingface(other.__getitem__, model, exported, tokenizer=None, force=True)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    import socket

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # a process id that is certainly no longer running
    leftover = tmp_path / f".out.partial-{socket.gethostname()}-{child}"
    leftover.mkdir()
    with hf_folder.staged_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- import


def test_the_real_vocabulary_under_the_padding_comes_from_manifest_then_tokenizer(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = tiny_model(vocab_size=299, hidden_dropout=0.25)
    folder = tmp_path / "out"
    export_huggingface(random_weights(model).__getitem__, model, folder, tokenizer=tokenizer_folder)
    assert import_huggingface(folder)[0] == model
    (folder / hf_folder.MANIFEST).unlink()
    by_tokenizer = import_huggingface(folder)[0]
    assert by_tokenizer.vocab_size == Tokenizer.load(tokenizer_folder).vocab_size
    assert by_tokenizer.padded_vocab_size == 320
    assert by_tokenizer.hidden_dropout == 0.0
    (folder / "tokenizer.json").unlink()
    bare = import_huggingface(folder)[0]
    assert (bare.vocab_size, bare.padded_vocab_size) == (320, 320)


def drop(weights: Weights) -> None:
    del weights["lm_head.bias"]


def add(weights: Weights) -> None:
    weights["model.layers.5.mlp.fc1.bias"] = torch.zeros(48)


def misshape(weights: Weights) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(31, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, r"1 missing: lm_head.bias \[320\]"),
        (add, r"1 not of this model: model.layers.5.mlp.fc1.bias \[48\]"),
        (misshape, r"1 wrongly shaped: .*k_proj.weight \[31, 32\] where \[32, 32\] is expected"),
    ],
)
def test_wrong_tensors_are_named_before_any_is_read(
    exported: Path, change: Callable[[Weights], None], said: str
) -> None:
    rewrite(exported, change)
    with pytest.raises(CheckpointError, match=said):
        import_huggingface(exported)


def test_buffers_that_older_folders_saved_are_passed_over(exported: Path) -> None:
    def add_buffer(weights: Weights) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(exported, add_buffer)
    assert len(dict(import_huggingface(exported)[1])) == len(expected_shapes(tiny_model()))


def test_nan_in_the_weights_is_named_when_it_is_read(exported: Path) -> None:
    def poison(weights: Weights) -> None:
        weights["model.layers.1.mlp.fc1.weight"][2, 2] = float("nan")

    rewrite(exported, poison)
    _, weights = import_huggingface(exported)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.fc1.weight in .* holds NaN"):
        list(weights)


def test_truncated_and_missing_files_are_named(exported: Path) -> None:
    file = exported / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors"):
        import_huggingface(exported)
    file.rename(exported / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin; save it again"):
        import_huggingface(exported)
    hf_folder.write_json(
        exported / hf_weights.INDEX, {"weight_map": {"lm_head.bias": "model-1.safetensors"}}
    )
    with pytest.raises(CheckpointError, match=r"model-1.safetensors is missing"):
        import_huggingface(exported)


def other_configurations() -> Iterator[tuple[dict[str, object], str]]:
    yield {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama'"
    yield {"architectures": ["PhiForTokenClassification"]}, "PhiForTokenClassification"
    yield {"num_key_value_heads": 2}, "num_key_value_heads = 2; this system's phi has 4 alone"
    yield {"tie_word_embeddings": True}, "tie_word_embeddings = True"
    yield {"hidden_act": "relu"}, "hidden_act = 'relu'"
    yield {"qk_layernorm": True}, "qk_layernorm = True"
    yield {"hidden_size": "32"}, "cannot be used"
    yield {"num_attention_heads": 5}, "5 attention heads|num_key_value_heads"


@pytest.mark.parametrize(("change", "said"), list(other_configurations()))
def test_another_architecture_is_refused_by_what_differs(
    exported: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        import_huggingface(exported)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        import_huggingface(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        import_huggingface(tmp_path / "nowhere")
