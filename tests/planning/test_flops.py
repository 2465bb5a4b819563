"""Counts against outside references: transformers' own model, and what megatron-core builds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from phi1_megatron.config.schema import ModelConfig, RunConfig
from phi1_megatron.distributed.layout import plan_layout
from phi1_megatron.planning.flops import count_on_rank, count_parameters, flops_per_token
from tests.published_models import PHI_1, PHI_1_SMALL, PHI_2

PUBLISHED = pytest.mark.parametrize(
    ("model", "total", "blocks"),
    [
        (PHI_1, 1_418_270_720, 1_208_500_224),
        (PHI_1_SMALL, 356_794_368, 251_883_520),
        (PHI_2, 2_779_683_840, 2_517_483_520),
    ],
    ids=["phi-1", "phi-1-small", "phi-2"],
)


@PUBLISHED
def test_parameters_are_those_published(model: ModelConfig, total: int, blocks: int) -> None:
    count = count_parameters(model)
    assert count.total == total
    final_layernorm = 2 * model.hidden_size
    assert count.attention + count.mlp + count.layernorm - final_layernorm == blocks


@PUBLISHED
def test_parameters_are_those_of_transformers_phi(
    model: ModelConfig, total: int, blocks: int
) -> None:
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.ffn_hidden_size,
        vocab_size=model.padded_vocab_size,
    )
    with torch.device("meta"):
        reference = PhiForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in reference.named_parameters()}

    def summed(*words: str) -> int:
        return sum(size for name, size in sizes.items() if any(word in name for word in words))

    count = count_parameters(model)
    assert count.total == sum(sizes.values()) == total
    assert count.embedding == summed("embed_tokens")
    assert count.attention == summed("self_attn")
    assert count.mlp == summed(".mlp.")
    assert count.layernorm == summed("layernorm")
    assert count.output_layer == summed("lm_head")
    assert count.without_embedding == total - summed("embed_tokens")


def test_fewer_padding_rows_are_fewer_parameters() -> None:
    at_tensor_8 = PHI_1.model_copy(update={"make_vocab_size_divisible_by": 128})
    assert count_parameters(at_tensor_8).total == 1_414_599_808


@contextmanager
def one_of_many_ranks(config: RunConfig, rank: int, ranks: int) -> Iterator[None]:
    """Be one rank of a group whose other ranks are not there: enough to build its model."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from phi1_megatron.distributed.cpu_device import cpu_stands_in_for_cuda

    parallel = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with cpu_stands_in_for_cuda(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_state.initialize_model_parallel(
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                parallel.virtual_pipeline_model_parallel_size,
                create_gloo_process_groups=False,
            )
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 4},
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ],
    ids=["one rank", "TP4", "PP4", "TP2 + SP x PP2 (x2 virtual)"],
)
def test_a_rank_holds_what_megatron_core_builds_on_it(parallel: dict[str, Any]) -> None:
    from phi1_megatron.models.phi1 import build_model

    config = RunConfig.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "ffn_hidden_size": 96,
                "vocab_size": 100,
                "make_vocab_size_divisible_by": 64,
            },
            "parallel": parallel,
            "data": {"blend": ["unused"], "seq_length": 32},
            "scheduler": {"warmup_steps": 0},
            "training": {
                "train_steps": 1,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "precision": "fp32",
                "device": "cpu",
            },
        }
    )
    ranks = 4 if parallel else 1
    layout = plan_layout(config, ranks)
    for rank in range(ranks):
        with one_of_many_ranks(config, rank, ranks):
            chunks = build_model(config, "cpu")
        held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        stage = layout.coordinate(rank).pipeline
        assert count_on_rank(config.model, config.parallel, stage) == held


def test_operations_are_6_n_and_12_l_h_s() -> None:
    assert flops_per_token(PHI_1, 2048) == 6 * 1_313_413_120 + 12 * 24 * 2048 * 2048


def test_operations_are_those_of_the_forward_pass_three_times() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import PhiConfig, PhiForCausalLM

    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=256,
        vocab_size=128,
        make_vocab_size_divisible_by=1,
    )
    config = PhiConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=128,
        attn_implementation="eager",
    )
    length = 32
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        PhiForCausalLM(config)(torch.zeros(1, length, dtype=torch.long))
    matrices = 3 * counter.get_total_flops() / length
    ours = flops_per_token(model, length)
    # theirs counts the matrix products alone; N holds biases and LayerNorms too
    assert matrices < ours < 1.02 * matrices
