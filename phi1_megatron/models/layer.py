"""phi-1's transformer layer: attention and MLP side by side on one normalised input.

Tensors are ``[s, b, h]``: sequence (this rank's share of it under sequence parallelism), micro
batch, hidden. Inside attention ``[s, b, n, d]``: the whole sequence, micro batch, this rank's
heads, head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class Phi1Layer(TransformerLayer):
    """``x + dropout(attention(LN(x))) + dropout(mlp(LN(x)))`` with one LayerNorm (HF
    ``PhiDecoderLayer``)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[s, b, h]`` to ``[s, b, h]``; the second value is megatron-core's unused context."""
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(
            normed, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        mlp = self.mlp(normed)
        return hidden_states + self._dropout(*attention) + self._dropout(*mlp), None

    def _dropout(self, branch: Tensor, bias: Tensor) -> Tensor:
        """The branch with its bias, which megatron-core adds after the reduction."""
        return F.dropout(branch + bias, p=self.hidden_dropout, training=self.training)


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's LayerNorm under megatron-core's constructor, with sequence parallelism.

    Under sequence parallelism each rank normalises its own tokens, so its parameters' gradients
    must be summed over the tensor-parallel ranks: megatron-core does that where it finds the mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010


class ScaledDotProductAttention(MegatronModule):
    """Causal core attention by PyTorch's fused kernels; no score matrix is kept.

    Takes the place of megatron-core's ``DotProductAttention`` and has its constructor.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal
        assert attention_type == "self"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """``[s, b, n, d]`` each to ``[s, b, n * d]``; causal, whatever the mask says."""
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        dropout = self.dropout if self.training else 0.0
        if dropout > 0.0 and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so their dropout must differ too. (Under
            # sequence parallelism the whole layer already draws from this rank's own generator.)
            with get_cuda_rng_tracker().fork():
                return self._attend(query, key, value, dropout)
        return self._attend(query, key, value, dropout)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale
        )
        return attended.permute(2, 0, 1, 3).flatten(start_dim=2)
