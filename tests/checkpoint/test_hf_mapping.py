"""The name table against transformers itself, and against phi's published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from phi1_megatron.checkpoint.hf_mapping import (
    expected_huggingface_shapes,
    expected_shapes,
    mismatch,
)
from phi1_megatron.config.schema import ModelConfig
from tests.published_models import PHI_1, PHI_1_SMALL, PHI_2

SIZES = [(PHI_1, 1_418_270_720), (PHI_1_SMALL, 356_794_368), (PHI_2, 2_779_683_840)]


@pytest.mark.parametrize(("model", "parameters"), SIZES, ids=["phi-1", "phi-1-small", "phi-2"])
def test_the_table_adds_up_to_the_known_number_of_parameters(
    model: ModelConfig, parameters: int
) -> None:
    for shapes in (expected_shapes(model), expected_huggingface_shapes(model)):
        assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize(("model", "parameters"), SIZES, ids=["phi-1", "phi-1-small", "phi-2"])
def test_the_table_and_the_planner_count_alike(model: ModelConfig, parameters: int) -> None:
    flops = pytest.importorskip("phi1_megatron.planning.flops")
    assert flops.count_parameters(model).total == parameters


@pytest.mark.parametrize("model", [PHI_1, PHI_1_SMALL, PHI_2], ids=["phi-1", "small", "phi-2"])
def test_huggingface_names_and_shapes_are_those_of_PhiForCausalLM(model: ModelConfig) -> None:
    with torch.device("meta"):
        reference = PhiForCausalLM(
            PhiConfig(
                vocab_size=model.padded_vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
            )
        )
    wanted = {name: tuple(weight.shape) for name, weight in reference.state_dict().items()}
    assert expected_huggingface_shapes(model) == wanted


def test_missing_extra_and_misshapen_tensors_are_each_named() -> None:
    expected = {"a": (2, 3), "b": (4,), "c": (5,)}
    said = mismatch({"b": (7,), "c": (5,), "d": (1,)}, expected)
    assert said == (
        "1 missing: a [2, 3]; 1 not of this model: d [1]; "
        "1 wrongly shaped: b [7] where [4] is expected"
    )
    assert mismatch(expected, expected) is None


def test_a_long_list_of_differences_is_counted_rather_than_printed() -> None:
    said = mismatch({}, {f"t{n}": (1,) for n in range(20)})
    assert said is not None
    assert said.startswith("20 missing: t0 [1], ")
    assert said.endswith("t7 [1] and 12 more")
