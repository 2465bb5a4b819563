"""phi-1: megatron-core's ``GPTModel`` with parallel layers and a biased, untied output layer.

Tensors: tokens, labels and positions are ``[b, s]`` int64; logits ``[b, s, V / tp]`` in the run's
precision; per-token losses ``[b, s]`` fp32. ``V`` is the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor, nn

from phi1_megatron.config.schema import ModelConfig, RunConfig
from phi1_megatron.distributed.initialize import (
    Device,
    choose_device,
    is_first_stage,
    is_last_stage,
    parallel_context,
)
from phi1_megatron.models.initialization import global_name, initialize_weights
from phi1_megatron.models.spec import (
    Modules,
    local_modules,
    phi1_block_spec,
    transformer_engine_modules,
)
from phi1_megatron.models.transformer_config import (
    build_transformer_config,
    uses_transformer_engine,
)


class Phi1Model(GPTModel):
    """The share of phi-1 that one pipeline stage (or one of its model chunks) holds."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        modules: Modules,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=phi1_block_spec(
                modules, get_num_layers_to_build(config, vp_stage=vp_stage)
            ),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=is_first_stage(vp_stage),
            post_process=is_last_stage(vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
        if self.pre_process:
            # megatron-core drops embeddings out at the rate of the hidden states.
            self.embedding.embedding_dropout = nn.Dropout(model.embedding_dropout)
        if self.post_process:
            # phi-1's head has a bias (HF PhiForCausalLM.lm_head); GPTModel builds one without.
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_bias_add=False,
                gather_output=False,
                tp_group=self.pg_collection.tp,
            )


def build_model(config: RunConfig, device: Device) -> list[nn.Module]:
    """This rank's model chunks (one, or one for each virtual stage), with their first weights.

    The weights come from ``training.seed`` and their global names alone, so every layout starts
    from the same model. In fp16 and bf16 each chunk is wrapped in megatron-core's
    ``Float16Module``.
    """
    transformer_config = build_transformer_config(config, device)
    modules = (
        transformer_engine_modules() if uses_transformer_engine(config, device) else local_modules()
    )
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(virtual)) if virtual else [None]
    chunks: list[nn.Module] = []
    for vp_stage in stages:
        chunk = Phi1Model(config.model, transformer_config, modules, vp_stage)
        initialize_weights(chunk, config.model, config.training.seed)
        if device == "cuda":
            chunk.cuda(torch.cuda.current_device())
        chunks.append(
            chunk
            if config.training.precision == "fp32"
            else Float16Module(transformer_config, chunk)
        )
    return chunks


def named_weights(chunks: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under their names in the whole model (layers counted from 0)."""
    for chunk in chunks:
        bare = unwrap(chunk)
        for name, parameter in bare.named_parameters():
            yield global_name(bare, name), parameter


def unwrap(chunk: nn.Module) -> Phi1Model:
    """The ``Phi1Model`` inside megatron-core's data-parallel and half-precision wrappers."""
    while not isinstance(chunk, Phi1Model):
        chunk = chunk.get_submodule("module")
    return chunk


def reference_forward(
    model: ModelConfig, weights: Mapping[str, Tensor] | Callable[[str], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The whole model in this process on the CPU, in fp32: tokens ``[b, s]`` to logits
    ``[b, s, V]``.

    ``weights`` gives each tensor by its global name. Everything is built anew at each call, so
    that no process group outlives it.
    """
    read = weights.__getitem__ if isinstance(weights, Mapping) else weights
    config = RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"blend": ["unused"], "seq_length": model.max_position_embeddings},
            "scheduler": {"warmup_steps": 0},
            "training": {
                "train_steps": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "precision": "fp32",
                "device": "cpu",
            },
        }
    )

    def forward(tokens: Tensor) -> Tensor:
        with parallel_context(config), torch.no_grad():
            (chunk,) = build_model(config, choose_device("cpu"))
            for name, parameter in named_weights([chunk]):
                parameter.copy_(read(name))
            chunk.eval()
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            logits: Tensor = chunk(tokens, positions, None)
            return logits

    return forward
