"""How many parameters, how many operations: counted from the configuration, nothing allocated."""

from __future__ import annotations

from dataclasses import dataclass

from phi1_megatron.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, by part. ``h`` hidden, ``f`` MLP inner, ``V`` padded rows."""

    embedding: int
    """``V h``."""
    attention: int
    """All layers' q, k, v and output projections with their biases: ``4 h^2 + 4 h`` each."""
    mlp: int
    """All layers' two matrices with their biases: ``2 h f + f + h`` each."""
    layernorm: int
    """One LayerNorm a layer, and the final one: ``2 h`` each."""
    output_layer: int
    """``V h + V``: untied, with a bias."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.attention + self.mlp + self.layernorm + self.output_layer

    @property
    def without_embedding(self) -> int:
        """All that take part in matrix products for each token."""
        return self.total - self.embedding


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count a model. phi-1: 1,418,270,720; phi-1-small: 356,794,368 (HF shapes)."""
    hidden, inner, rows = model.hidden_size, model.ffn_hidden_size, model.padded_vocab_size
    return ParameterCount(
        embedding=rows * hidden,
        attention=model.num_layers * (4 * hidden * hidden + 4 * hidden),
        mlp=model.num_layers * (2 * hidden * inner + inner + hidden),
        layernorm=(model.num_layers + 1) * 2 * hidden,
        output_layer=rows * hidden + rows,
    )


def count_on_rank(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that each rank of a pipeline stage holds.

    Tensor-parallel ranks split the matrices and the biases along their outputs; LayerNorms and the
    biases that are added after a reduction are on all of them. The first stage has the embedding,
    the last one the final LayerNorm and the output layer.
    """
    hidden, inner, rows = model.hidden_size, model.ffn_hidden_size, model.padded_vocab_size
    tensor = parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    split = 4 * hidden * hidden + 3 * hidden + 2 * hidden * inner + inner
    whole = 2 * hidden + 2 * hidden
    held = model.num_layers // stages * (split // tensor + whole)
    if stage == 0:
        held += rows // tensor * hidden
    if stage == stages - 1:
        held += rows // tensor * (hidden + 1) + 2 * hidden
    return held


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Operations to train on one token: ``6 N + 12 L h s``.

    ``N`` counts the parameters without the input embedding; attention is not halved for causality
    (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", 2021, section 5.1).
    """
    attention = 12 * model.num_layers * model.hidden_size * seq_length
    return 6 * count_parameters(model).without_embedding + attention
