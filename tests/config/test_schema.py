"""The sections: what they default to, derive and refuse."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pydantic import BaseModel, ValidationError

from phi1_megatron.config.load import parse_config
from phi1_megatron.config.schema import ModelConfig, RunConfig
from phi1_megatron.errors import RecipeError


def sections_of(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [cast("type[BaseModel]", field.annotation) for field in model.model_fields.values()]


def run(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"blend": ["data/a"]},
        "training": {"train_steps": 1000, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return parse_config(tree, source="recipe")


def test_the_default_model_is_phi_1() -> None:
    model = ModelConfig()
    shape = (model.num_layers, model.hidden_size, model.num_attention_heads, model.head_dim)
    assert shape == (24, 2048, 32, 64)
    assert (model.ffn_hidden_size, model.rotary_dim) == (8192, 32)
    assert (model.vocab_size, model.padded_vocab_size) == (50295, 51200)


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"),
    [(50295, 1024, 51200), (50295, 128, 50304), (128, 128, 128), (129, 128, 256), (7, 1, 7)],
)
def test_the_vocabulary_is_padded_up_to_a_multiple(
    vocab_size: int, multiple: int, rows: int
) -> None:
    model = ModelConfig(vocab_size=vocab_size, make_vocab_size_divisible_by=multiple)
    assert model.padded_vocab_size == rows


def test_the_rotated_share_of_phi_2_s_wider_heads() -> None:
    model = ModelConfig(hidden_size=2560, num_attention_heads=32, rotary_percent=0.4)
    assert (model.head_dim, model.rotary_dim) == (80, 32)


@pytest.mark.parametrize("section", [RunConfig, *sections_of(RunConfig)])
def test_every_field_says_what_it_means(section: type[BaseModel]) -> None:
    silent = [name for name, field in section.model_fields.items() if not field.description]
    assert silent == []


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    config = run()
    with pytest.raises(ValidationError, match="frozen"):
        config.training.train_steps = 3  # type: ignore[misc]


def test_prefixes_alone_have_equal_weights_and_may_stand_beside_weighted_ones() -> None:
    config = run(data={"blend": ["a", {"prefix": "b", "weight": 2.5}]})
    assert [(part.prefix, part.weight) for part in config.data.blend] == [("a", 1.0), ("b", 2.5)]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"model": {"hidden_size": 100, "num_attention_heads": 3}},
            r"hidden_size 100 does not divide into 3 attention heads \(100 / 3 = 33\.3333\)",
        ),
        (
            {"model": {"hidden_size": 40, "num_attention_heads": 4, "rotary_percent": 0.5}},
            r"rotary_percent 0\.5 of a 10-dimensional head is 5 dimensions; .* an even number",
        ),
        (
            {"model": {"hidden_size": 40, "num_attention_heads": 4, "rotary_percent": 0.05}},
            "an even number",
        ),
        ({"parallel": {"sequence_parallel": True}}, "tensor_model_parallel_size is 1; set it to 2"),
        (
            {"parallel": {"virtual_pipeline_model_parallel_size": 2}},
            "virtual_pipeline_model_parallel_size = 2 needs .* pipeline_model_parallel_size is 1",
        ),
        (
            {"parallel": {"overlap_param_gather": True}},
            "overlap_param_gather needs use_distributed_optimizer = true and overlap_grad_reduce",
        ),
        ({"data": {"blend": []}}, r"data\.blend = \[\]"),
        ({"data": {"split": [0.0, 1.0, 0.0]}}, r"split \[0\.0, 1\.0, 0\.0\] must hold .* above 0"),
        ({"data": {"split": [1.0, -1.0, 0.0]}}, "three shares of at least 0"),
        (
            {"data": {"split": [1.0, 0.0, 0.0]}},
            r"eval_interval 1000 asks for validation, but data\.split \[1\.0, 0\.0, 0\.0\] keeps",
        ),
        ({"data": {"split": [1.0, 1.0]}}, r"data\.split"),
        (
            {"data": {"seq_length": 4096}},
            r"data\.seq_length 4096 is longer than model\.max_position_embeddings 2048",
        ),
        (
            {"scheduler": {"warmup_steps": 1000}},
            r"warmup_steps 1000 must be below the 1000 steps of the decay",
        ),
        (
            {"scheduler": {"warmup_steps": 20, "decay_steps": 10}},
            r"warmup_steps 20 must be below the 10 steps",
        ),
        ({"scheduler": {"min_lr": 0.1}}, r"scheduler\.min_lr 0\.1 is above optimizer\.lr 0\.001"),
        ({"scheduler": {"init_lr": 0.1}}, r"scheduler\.init_lr 0\.1 is above optimizer\.lr 0\.001"),
    ],
)
def test_what_cannot_be_is_refused_with_its_arithmetic(
    sections: dict[str, dict[str, Any]], said: str
) -> None:
    with pytest.raises(RecipeError, match=f"recipe: .*{said}"):
        run(**sections)


def test_a_decay_longer_than_the_run_leaves_room_for_the_warm_up() -> None:
    config = run(scheduler={"warmup_steps": 1000, "decay_steps": 36000})
    assert config.scheduler.warmup_steps == config.training.train_steps
