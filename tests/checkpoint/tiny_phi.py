"""A phi small enough for any test, with every weight and bias random."""

from __future__ import annotations

import torch
from torch import Tensor

from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.config.schema import ModelConfig

Weights = dict[str, Tensor]


def tiny_model(**changes: object) -> ModelConfig:
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 300,
        "make_vocab_size_divisible_by": 64,
        "max_position_embeddings": 64,
    }
    return ModelConfig.model_validate(fields | changes)


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for name, shape in expected_shapes(model).items()
    }
