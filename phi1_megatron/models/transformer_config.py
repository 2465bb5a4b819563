"""Our ``RunConfig`` in megatron-core's words: one ``TransformerConfig`` for every layout."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.initialize import Device
from phi1_megatron.errors import LayoutError

PARAMS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

tanh_gelu = partial(F.gelu, approximate="tanh")
"""HF's ``gelu_new``: the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""


def uses_transformer_engine(config: RunConfig, device: Device) -> bool:
    """Are the layer's modules TransformerEngine's? They need it installed and a GPU.

    Raises:
        LayoutError: it was asked for by name, or context parallelism needs it, and it is not there.
    """
    wanted = config.training.transformer_impl
    installed = importlib.util.find_spec("transformer_engine") is not None
    available = installed and device == "cuda"
    missing = "a CUDA device" if installed else "the transformer_engine package (extra 'gpu')"
    if wanted == "transformer_engine" and not available:
        raise LayoutError(
            f"training.transformer_impl is 'transformer_engine', which needs {missing}; "
            "use 'auto' or 'local' here"
        )
    if config.parallel.context_parallel_size > 1 and (wanted == "local" or not available):
        raise LayoutError(
            f"parallel.context_parallel_size {config.parallel.context_parallel_size} needs "
            "TransformerEngine's attention on a GPU; here the local attention runs, which sees "
            "whole sequences: set it to 1"
        )
    return available and wanted != "local"


def build_transformer_config(config: RunConfig, device: Device) -> TransformerConfig:
    """megatron-core's configuration of one run on one kind of device."""
    model, parallel, training = config.model, config.parallel, config.training
    on_gpu = device == "cuda"
    dtype = PARAMS_DTYPE[training.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        layernorm_epsilon=model.layernorm_epsilon,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        add_bias_linear=True,
        add_qkv_bias=True,
        # megatron-core's fused bias + GELU kernel is the tanh form, and wants F.gelu's name.
        activation_func=F.gelu if on_gpu else tanh_gelu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=on_gpu and _has_weight_gradient_kernel(),
        # phi1_megatron.models.initialization fills the weights, alike in every layout. (With
        # perform_initialization off, megatron-core would not mark which weights are split.)
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        use_cpu_initialization=not on_gpu,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        deallocate_pipeline_outputs=on_gpu,
        # With two stages, next and previous are the same rank: in one batch of messages the
        # interleaved schedule's forward and backward ones would be taken for each other.
        # Overlapped, megatron-core sends them on two process groups.
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        recompute_granularity=None if training.recompute == "none" else training.recompute,
        recompute_method="uniform" if training.recompute == "full" else None,
        recompute_num_layers=1 if training.recompute == "full" else None,
    )


def _leave_as_it_is(weight: Tensor) -> Tensor:
    return weight


def _has_weight_gradient_kernel() -> bool:
    """NVIDIA apex's extension that accumulates weight gradients in fp32, used by megatron-core."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
