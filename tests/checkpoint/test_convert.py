"""Conversion against ``transformers.PhiForCausalLM`` with random weights and random biases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from phi1_megatron.checkpoint import hf_folder
from phi1_megatron.checkpoint.convert import (
    LogitsComparison,
    compare_logits,
    export_huggingface,
    huggingface_to_megatron,
    import_huggingface,
    interleave_qkv,
    megatron_to_huggingface,
    verification_tokens,
)
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.checkpoint.model_card import ModelCard
from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.data.tokenizer import Tokenizer, codegen_tokenizer, train_bpe
from phi1_megatron.errors import CheckpointError, UsageError
from tests.checkpoint.tiny_phi import random_weights, tiny_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference_model(model: ModelConfig) -> PhiForCausalLM:
    """transformers' model with every tensor random: its own initialisation leaves biases zero."""
    config = PhiConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        partial_rotary_factor=model.rotary_percent,
    )
    reference = PhiForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return reference


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


# ---- tensors


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 5),
    half_head=st.integers(2, 4),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 9),
    vocab=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_there_and_back_is_bit_equal_for_any_shape_and_type(
    heads: int, half_head: int, layers: int, ffn: int, vocab: int, dtype: torch.dtype
) -> None:
    model = tiny_model(
        num_layers=layers,
        hidden_size=heads * 2 * half_head,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        make_vocab_size_divisible_by=8,
        rotary_percent=1.0,
    )
    ours = random_weights(model, dtype)
    theirs = dict(megatron_to_huggingface(ours, model))
    back = dict(huggingface_to_megatron(theirs, model))
    assert list(back) == list(ours)
    for name, tensor in ours.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_fused_rows_are_ordered_by_head_then_qkv_then_dimension() -> None:
    rows = torch.arange(6.0)  # two heads of three dimensions
    fused = interleave_qkv(rows, rows + 10, rows + 20, num_heads=2)
    assert fused.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 3, 4, 5, 13, 14, 15, 23, 24, 25]


def test_missing_extra_and_misshapen_weights_of_ours_are_named() -> None:
    model = tiny_model()
    weights = random_weights(model)
    del weights["output_layer.bias"]
    weights["decoder.layers.1.mlp.linear_fc1.bias"] = torch.zeros(47)
    weights["decoder.layers.9.mlp.linear_fc1.bias"] = torch.zeros(48)
    weights["decoder.layers.0.mlp._extra_state"] = torch.zeros(1)  # no weight: not complained of
    with pytest.raises(CheckpointError) as caught:
        next(megatron_to_huggingface(weights, model))
    message = str(caught.value)
    assert "1 missing: output_layer.bias [320]" in message
    assert "1 not of this model: decoder.layers.9.mlp.linear_fc1.bias [48]" in message
    assert "decoder.layers.1.mlp.linear_fc1.bias [47] where [48] is expected" in message
    with pytest.raises(CheckpointError, match=r"linear_fc1.bias is \[47\].*\[48\]"):
        list(megatron_to_huggingface(weights.__getitem__, model))


# ---- export


def test_an_imported_reference_exports_to_the_same_bits_and_logits(tmp_path: Path) -> None:
    model = tiny_model(rotary_percent=1.0)  # not PhiConfig's 0.5: the factor must get through
    reference = reference_model(model)
    reference.save_pretrained(tmp_path / "reference")
    read_model, weights = import_huggingface(tmp_path / "reference")
    ours = dict(weights)
    assert read_model.rotary_percent == 1.0
    export_huggingface(ours.__getitem__, read_model, tmp_path / "out", tokenizer=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is PhiForCausalLM
    state = loaded.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens = verification_tokens(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_the_exported_model_gives_megatron_cores_logits(exported: Path) -> None:
    phi1 = pytest.importorskip("phi1_megatron.models.phi1")
    model = tiny_model()
    forward = phi1.reference_forward(model, random_weights(model))
    comparison = compare_logits(forward, exported, verification_tokens(model))
    assert comparison.num_tokens == 128
    assert comparison.largest_logit > 0.1
    assert comparison.max_rel_difference < 1e-5


def test_a_wrong_conversion_is_noticed_by_its_logits(exported: Path) -> None:
    reference = reference_model(tiny_model())
    comparison = compare_logits(
        lambda tokens: reference(tokens).logits, exported, verification_tokens(tiny_model())
    )
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        comparison.require()
    with pytest.raises(CheckpointError):
        LogitsComparison(float("nan"), 1.0, 1).require()
    LogitsComparison(1e-6, 1.0, 1).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_written_as_itself_and_comes_back_bit_equal(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model()
    ours = random_weights(model, dtype)
    export_huggingface(ours.__getitem__, model, tmp_path / "out", tokenizer=None)
    read_model, weights = import_huggingface(tmp_path / "out")
    assert read_model == model
    for name, tensor in weights:
        assert tensor.dtype == dtype
        assert torch.equal(tensor, ours[name]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_weights_are_cast_when_a_type_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model()
    ours = random_weights(model)
    export_huggingface(
        ours.__getitem__, model, tmp_path / "out", tokenizer=None, dtype=torch.bfloat16
    )
    for name, tensor in import_huggingface(tmp_path / "out")[1]:
        assert torch.equal(tensor, ours[name].to(torch.bfloat16))


def test_a_number_too_large_for_the_type_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    ours = random_weights(model)
    ours["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] = 7e4
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.fc2.weight holds 70000, .*65504"):
        export_huggingface(
            ours.__getitem__, model, tmp_path / "out", tokenizer=None, dtype=torch.float16
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_of_two_types_need_the_type_to_be_named(tmp_path: Path) -> None:
    model = tiny_model()
    ours = random_weights(model, torch.bfloat16)
    ours["output_layer.bias"] = ours["output_layer.bias"].float()
    with pytest.raises(CheckpointError, match=r"output_layer.bias is torch.float32"):
        export_huggingface(ours.__getitem__, model, tmp_path / "out", tokenizer=None)


def test_shards_stay_within_their_size_and_load_together(tmp_path: Path) -> None:
    model = tiny_model()
    ours = random_weights(model)
    export_huggingface(
        ours.__getitem__, model, tmp_path / "out", tokenizer=None, max_shard_bytes=45_000
    )
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(shard.stat().st_size < 45_000 + 4096 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in megatron_to_huggingface(ours, model):
        assert torch.equal(state[name], tensor), name
    for name, tensor in import_huggingface(tmp_path / "out")[1]:
        assert torch.equal(tensor, ours[name]), name


def test_no_more_than_one_of_our_tensors_is_held_at_a_time(tmp_path: Path) -> None:
    import weakref

    model = tiny_model()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = torch.zeros(expected_shapes(model)[name])
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    export_huggingface(read, model, tmp_path / "out", tokenizer=None, dtype=torch.float32)
    assert most <= 2  # the one just read, and the one whose last piece was just written


def test_the_end_of_text_id_is_the_tokenizers_and_never_PhiConfigs_default(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = tiny_model()
    weights = random_weights(model)
    export_huggingface(weights.__getitem__, model, tmp_path / "out", tokenizer=tokenizer_folder)
    wanted = Tokenizer.load(tokenizer_folder).eod_id
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for holder in (loaded.config, loaded.generation_config, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id) == (wanted, wanted)
    text = "def f():\n\t\treturn a . b\n\n"
    assert tokenizer(text).input_ids == Tokenizer.load(tokenizer_folder).encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    bare = tiny_model(vocab_size=50295, make_vocab_size_divisible_by=1024)
    assert hf_folder.open_tokenizer(None, bare) == (None, 50256)
    assert hf_folder.open_tokenizer(None, model) == (None, None)


def test_an_export_with_codegens_tokenizer_opens_with_its_ids(
    tmp_path: Path, shared_data: Path
) -> None:
    files = [shared_data / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
    codegen_tokenizer(*files).save(tmp_path / "tokenizer")
    model = tiny_model(
        vocab_size=50295, make_vocab_size_divisible_by=1024, hidden_size=8, num_attention_heads=1
    )
    export_huggingface(
        random_weights(model).__getitem__,
        model,
        tmp_path / "out",
        tokenizer=tmp_path / "tokenizer",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (50256, 50256)
    assert config["vocab_size"] == 51200
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(" " * 40).input_ids == [50257, 50279]
    assert tokenizer("<|endoftext|>").input_ids == [50256]


def test_the_configuration_is_phi_1s_for_transformers(exported: Path) -> None:
    config = PhiConfig.from_pretrained(exported)
    assert config.architectures == ["PhiForCausalLM"]
    assert config.vocab_size == 320
    assert config.tie_word_embeddings is False
    assert config.eos_token_id is None
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert (config.resid_pdrop, config.embd_pdrop, config.attention_dropout) == (0.0, 0.0, 0.0)


def test_older_readers_find_the_rotary_values_and_the_type_at_the_top_level() -> None:
    phi_2 = ModelConfig(hidden_size=2560, ffn_hidden_size=10240, rotary_percent=0.4)
    config = hf_folder.huggingface_config(phi_2, torch.float16, 50256)
    assert (config["partial_rotary_factor"], config["rope_theta"]) == (0.4, 10000.0)
    assert config["torch_dtype"] == config["dtype"] == "float16"


def test_a_tokenizer_that_would_remove_spaces_is_copied_without_that(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    source = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["clean_up_tokenization_spaces"] = True
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    model = tiny_model()
    export_huggingface(random_weights(model).__getitem__, model, tmp_path / "o", tokenizer=source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert tokenizer.decode(tokenizer("a . b").input_ids) == "a . b"
    # transformers 4 obeys the file.
    copied = json.loads((tmp_path / "o" / "tokenizer_config.json").read_text())
    assert copied == config | {"clean_up_tokenization_spaces": False}


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    model = tiny_model(vocab_size=256)
    with pytest.raises(UsageError, match=r"knows 29. tokens and the model has 256 rows"):
        export_huggingface(
            random_weights(model).__getitem__, model, tmp_path / "o", tokenizer=tokenizer_folder
        )


def test_the_card_tells_recipe_data_and_metrics(tmp_path: Path) -> None:
    model = tiny_model()
    card = ModelCard(
        title="a small phi",
        step=120,
        data=("stdlib",),
        metrics={"validation loss": 2.5},
        recipe="[model]\nnum_layers = 2",
    )
    export_huggingface(
        random_weights(model).__getitem__, model, tmp_path / "out", tokenizer=None, card=card
    )
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "# a small phi",
        "| training steps | 120 |",
        "`stdlib`",
        "| validation loss | 2.5",
    ):
        assert said in text
    assert "num_layers = 2" in text


def test_progress_ends_at_the_bytes_of_the_whole(tmp_path: Path) -> None:
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    total = export_huggingface(
        random_weights(model).__getitem__,
        model,
        tmp_path / "out",
        tokenizer=None,
        on_progress=lambda done, whole: seen.append((done, whole)),
    )
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
