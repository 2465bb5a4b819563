"""First weights that do not depend on the layout: one seed, one model.

Each tensor is drawn whole from a generator of its own, seeded by the run's seed and the tensor's
name in the whole model; a rank keeps its share. So TP, PP and VPP change where a number lies and
never which number it is.
"""

from __future__ import annotations

import hashlib
import re
from typing import cast

import torch
from torch import Tensor, nn

from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.distributed.initialize import tensor_parallel_rank, tensor_parallel_size

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def global_name(chunk: nn.Module, name: str) -> str:
    """A parameter's name in the whole model: layers counted over all stages, from 0."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = chunk.get_submodule(f"decoder.layers.{match.group(1)}")
    number = cast(int, layer.layer_number) - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def initialize_weights(chunk: nn.Module, model: ModelConfig, seed: int) -> None:
    """Fill one model chunk: N(0, ``init_method_std``) for every matrix, zeros for biases, ones for
    LayerNorm weights (CFG; no depth scaling)."""
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if parameter.dim() == 1:
                is_scale = "layernorm" in name and name.endswith("weight")
                parameter.fill_(1.0 if is_scale else 0.0)
            else:
                _fill_matrix(parameter, global_name(chunk, name), model.init_method_std, seed)


def _fill_matrix(parameter: nn.Parameter, name: str, std: float, seed: int) -> None:
    sharded = getattr(parameter, "tensor_model_parallel", False)
    tensor_ranks = tensor_parallel_size() if sharded else 1
    dimension = int(getattr(parameter, "partition_dim")) if sharded else 0  # noqa: B009
    shape = list(parameter.shape)
    shape[dimension] *= tensor_ranks
    whole = _draw(name, shape, std, seed)
    parameter.copy_(whole.chunk(tensor_ranks, dimension)[tensor_parallel_rank() if sharded else 0])


def _draw(name: str, shape: list[int], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.normal(0.0, std, tuple(shape), generator=generator, dtype=torch.float32)
