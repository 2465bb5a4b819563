"""What a layer is made of: TransformerEngine's modules on a GPU, our and megatron-core's elsewhere.

Parameter names are the same in both, so a checkpoint does not know which one wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from phi1_megatron.models.layer import LayerNorm, Phi1Layer, ScaledDotProductAttention


@dataclass(frozen=True)
class Modules:
    """The four kinds of module a phi-1 layer is built of."""

    layer_norm: type
    column_linear: type
    row_linear: type
    core_attention: type


def local_modules() -> Modules:
    """megatron-core's linears, PyTorch's LayerNorm and fused attention: any device."""
    return Modules(LayerNorm, ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention)


def transformer_engine_modules() -> Modules:
    """TransformerEngine's LayerNorm, linears and attention: CUDA only."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return Modules(TENorm, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def phi1_layer_spec(modules: Modules) -> ModuleSpec:
    """One phi-1 layer. The norm is a module of its own: two branches share it."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.column_linear,
            core_attention=modules.core_attention,
            linear_proj=modules.row_linear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=modules.column_linear, linear_fc2=modules.row_linear),
    )
    return ModuleSpec(
        module=Phi1Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.layer_norm,
            self_attention=attention,
            pre_mlp_layernorm=IdentityOp,
            mlp=mlp,
        ),
    )


def phi1_block_spec(modules: Modules, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (or model chunk) and the final LayerNorm."""
    layer = phi1_layer_spec(modules)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=modules.layer_norm
    )
