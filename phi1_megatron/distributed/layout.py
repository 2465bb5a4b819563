"""Layout arithmetic: what divides into what. Plain numbers; no torch, no megatron.

Rank order is megatron-core's default, ``tp-cp-dp-pp``: tensor-parallel neighbours are adjacent
ranks (one node), pipeline stages are farthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi1_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phi1_megatron.errors import LayoutError


@dataclass(frozen=True)
class Coordinate:
    """Where one rank stands in the layout; every field counts from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """A layout that divides. Make one with ``plan_layout``."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    sequence_parallel: bool
    num_microbatches: int

    def coordinate(self, rank: int) -> Coordinate:
        """The place of a global rank."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside the {self.world_size} ranks of this layout")
        tensor = rank % self.tensor
        context = rank // self.tensor % self.context
        data = rank // (self.tensor * self.context) % self.data
        pipeline = rank // (self.tensor * self.context * self.data)
        return Coordinate(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def rank(self, place: Coordinate) -> int:
        """The global rank at a place: the inverse of ``coordinate``."""
        outer = place.pipeline * self.data + place.data
        return (outer * self.context + place.context) * self.tensor + place.tensor

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def describe(self) -> str:
        """One line: ``TP2 + SP x PP2 (x2 virtual) x DP4 = 16 ranks``."""
        tensor = f"TP{self.tensor}" + (" + SP" if self.sequence_parallel else "")
        stages = f"PP{self.pipeline}"
        if self.virtual_pipeline > 1:
            stages += f" (x{self.virtual_pipeline} virtual)"
        context = [f"CP{self.context}"] if self.context > 1 else []
        ranks = f"{self.world_size} rank" + ("" if self.world_size == 1 else "s")
        return " x ".join([tensor, stages, *context, f"DP{self.data}"]) + f" = {ranks}"


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that one copy of the model takes: the fewest a run can have."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def plan_layout(config: RunConfig, world_size: int) -> Layout:
    """Place a run on ``world_size`` ranks.

    Raises:
        LayoutError: something does not divide; the message has the arithmetic.
    """
    _check_model_divides(config.model, config.parallel)
    _check_sequence_divides(config)
    parallel = config.parallel
    data = _data_parallel_size(parallel, world_size)
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual_pipeline=parallel.virtual_pipeline_model_parallel_size or 1,
        context=parallel.context_parallel_size,
        data=data,
        sequence_parallel=parallel.sequence_parallel,
        num_microbatches=_num_microbatches(config, data),
    )


def _check_model_divides(model: ModelConfig, parallel: ParallelConfig) -> None:
    tensor = parallel.tensor_model_parallel_size
    for name, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
    ):
        if size % tensor:
            raise LayoutError(
                f"{name} {size} does not divide over tensor_model_parallel_size {tensor} "
                f"({size} / {tensor} = {size / tensor:g})"
            )
    if model.padded_vocab_size % tensor:
        raise LayoutError(
            f"the padded vocabulary of {model.padded_vocab_size} rows does not divide over "
            f"tensor_model_parallel_size {tensor}; set model.make_vocab_size_divisible_by "
            f"(now {model.make_vocab_size_divisible_by}) to a multiple of {tensor}"
        )
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    if model.num_layers % (pipeline * virtual):
        stages = f"pipeline {pipeline}" + (f" x virtual {virtual}" if virtual > 1 else "")
        raise LayoutError(
            f"{model.num_layers} layers do not divide into {stages} "
            f"({model.num_layers} / {pipeline * virtual} = "
            f"{model.num_layers / (pipeline * virtual):g})"
        )


def _check_sequence_divides(config: RunConfig) -> None:
    parallel = config.parallel
    split = parallel.context_parallel_size * (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )
    if config.data.seq_length % split:
        raise LayoutError(
            f"data.seq_length {config.data.seq_length} does not divide over the {split} ranks that "
            f"share a sequence ({config.data.seq_length} / {split} = "
            f"{config.data.seq_length / split:g})"
        )


def _data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    per_copy = model_parallel_size(parallel)
    if world_size < 1 or world_size % per_copy:
        raise LayoutError(
            f"{world_size} ranks do not divide into copies of the model of {per_copy} ranks each "
            f"(tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}); "
            f"start a multiple of {per_copy}"
        )
    return world_size // per_copy


def _num_microbatches(config: RunConfig, data: int) -> int:
    training = config.training
    at_once = training.micro_batch_size * data
    if training.global_batch_size % at_once:
        raise LayoutError(
            f"training.global_batch_size {training.global_batch_size} does not divide into "
            f"micro batches of {training.micro_batch_size} on {data} data-parallel ranks "
            f"({training.global_batch_size} / {at_once} = "
            f"{training.global_batch_size / at_once:g})"
        )
    num_microbatches = training.global_batch_size // at_once
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_model_parallel_size and num_microbatches % stages:
        raise LayoutError(
            f"the interleaved schedule needs its {num_microbatches} micro batches "
            f"(global {training.global_batch_size} / {training.micro_batch_size} x {data}) "
            f"to be a multiple of the {stages} pipeline stages"
        )
    return num_microbatches
