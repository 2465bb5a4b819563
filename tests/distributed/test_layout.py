"""Layout arithmetic, against megatron-core's own rank generator, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.layout import Coordinate, Layout, model_parallel_size, plan_layout
from phi1_megatron.errors import LayoutError

sizes = st.integers(1, 6)


def run(**sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"blend": ["data/a"]},
        "scheduler": {"warmup_steps": 0},
        "training": {"train_steps": 10, "global_batch_size": 64, "micro_batch_size": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return RunConfig.model_validate(tree)


def layout_of(tensor: int, pipeline: int, context: int, data: int) -> Layout:
    return Layout(
        world_size=tensor * pipeline * context * data,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=1,
        context=context,
        data=data,
        sequence_parallel=False,
        num_microbatches=1,
    )


@given(sizes, sizes, sizes, sizes)
def test_every_rank_has_a_place_of_its_own_and_every_place_a_rank(
    tensor: int, pipeline: int, context: int, data: int
) -> None:
    layout = layout_of(tensor, pipeline, context, data)
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    assert len(set(places)) == layout.world_size
    for place in places:
        assert 0 <= place.tensor < tensor
        assert 0 <= place.pipeline < pipeline
        assert 0 <= place.context < context
        assert 0 <= place.data < data


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, sizes)
def test_groups_are_those_that_megatron_core_makes(
    tensor: int, pipeline: int, context: int, data: int
) -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = layout_of(tensor, pipeline, context, data)
    theirs = RankGenerator(
        tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp"
    )
    for token, field in (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "pipeline")):
        ours: dict[Coordinate, list[int]] = {}
        for rank in range(layout.world_size):
            place = layout.coordinate(rank)
            # a group is the ranks that differ in this coordinate alone, in its order
            rest = Coordinate(**{**vars(place), field: 0})
            ours.setdefault(rest, []).append(rank)
        assert sorted(ours.values()) == sorted(theirs.get_ranks(token))


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_layout_has_no_place(rank: int) -> None:
    with pytest.raises(LayoutError, match=f"rank {rank} is outside the 8 ranks"):
        layout_of(2, 2, 1, 2).coordinate(rank)


def test_tensor_ranks_are_neighbours_and_stages_far_apart() -> None:
    layout = layout_of(tensor=2, pipeline=2, context=1, data=8)
    assert layout.coordinate(1) == Coordinate(tensor=1, context=0, data=0, pipeline=0)
    assert layout.coordinate(2) == Coordinate(tensor=0, context=0, data=1, pipeline=0)
    assert layout.coordinate(16) == Coordinate(tensor=0, context=0, data=0, pipeline=1)


def test_data_parallel_size_and_accumulation_follow_from_the_ranks() -> None:
    config = run(parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    for ranks, data, accumulated in ((4, 1, 32), (8, 2, 16), (32, 8, 4)):
        layout = plan_layout(config, ranks)
        assert (layout.data, layout.num_microbatches) == (data, accumulated)
        assert layout.model_parallel_size == model_parallel_size(config.parallel) == 4
        assert 2 * layout.data * layout.num_microbatches == 64


@pytest.mark.parametrize(
    ("parallel", "ranks", "said"),
    [
        ({}, 1, "TP1 x PP1 x DP1 = 1 rank"),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            4,
            "TP2 + SP x PP1 x DP2 = 4 ranks",
        ),
        (
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 3,
                "context_parallel_size": 2,
            },
            16,
            "TP2 x PP2 (x3 virtual) x CP2 x DP2 = 16 ranks",
        ),
    ],
)
def test_a_layout_describes_itself_in_one_line(
    parallel: dict[str, Any], ranks: int, said: str
) -> None:
    assert plan_layout(run(parallel=parallel), ranks).describe() == said


@pytest.mark.parametrize(
    ("sections", "ranks", "said"),
    [
        (
            {"parallel": {"tensor_model_parallel_size": 3}},
            3,
            r"num_attention_heads 32 does not divide over .*_size 3 \(32 / 3 = 10\.6667\)",
        ),
        (
            {
                "model": {"ffn_hidden_size": 8190},
                "parallel": {"tensor_model_parallel_size": 4},
            },
            4,
            r"model\.ffn_hidden_size 8190 does not divide .* \(8190 / 4 = 2047\.5\)",
        ),
        (
            {
                "model": {"make_vocab_size_divisible_by": 1},
                "parallel": {"tensor_model_parallel_size": 2},
            },
            2,
            r"vocabulary of 50295 rows .*divisible_by \(now 1\) to a multiple of 2",
        ),
        (
            {"parallel": {"pipeline_model_parallel_size": 5}},
            5,
            r"24 layers do not divide into pipeline 5 \(24 / 5 = 4\.8\)",
        ),
        (
            {
                "parallel": {
                    "pipeline_model_parallel_size": 2,
                    "virtual_pipeline_model_parallel_size": 5,
                }
            },
            2,
            r"24 layers do not divide into pipeline 2 x virtual 5 \(24 / 10 = 2\.4\)",
        ),
        (
            {
                "data": {"seq_length": 1001},
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            },
            2,
            r"seq_length 1001 does not divide over the 2 ranks .* \(1001 / 2 = 500\.5\)",
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
            6,
            r"6 ranks do not divide .* of 4 ranks each \(tensor 2 x pipeline 2 x context 1\); "
            "start a multiple of 4",
        ),
        ({"parallel": {"tensor_model_parallel_size": 2}}, 1, "1 ranks do not .* multiple of 2"),
        ({}, 0, "0 ranks do not divide"),
        (
            {},
            3,
            r"global_batch_size 64 .* micro batches of 2 on 3 data-parallel ranks "
            r"\(64 / 6 = 10\.6667\)",
        ),
        ({}, 64, r"\(64 / 128 = 0\.5\)"),
        (
            {
                "training": {"global_batch_size": 6},
                "parallel": {
                    "pipeline_model_parallel_size": 2,
                    "virtual_pipeline_model_parallel_size": 2,
                },
            },
            2,
            r"its 3 micro batches \(global 6 / 2 x 1\) to be a multiple of the 2 pipeline stages",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_its_arithmetic(
    sections: dict[str, dict[str, Any]], ranks: int, said: str
) -> None:
    with pytest.raises(LayoutError, match=said):
        plan_layout(run(**sections), ranks)


def test_sequences_divide_over_tensor_ranks_only_where_they_are_split_over_them() -> None:
    config = run(data={"seq_length": 1001}, parallel={"tensor_model_parallel_size": 2})
    assert plan_layout(config, 2).tensor == 2
