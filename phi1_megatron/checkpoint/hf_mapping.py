"""The names and shapes of phi-1's weights, in our checkpoints and in Hugging Face's.

One table of data. The canonical names are those of a one-process ``GPTModel.state_dict()``: they do
not depend on the layout. The Hugging Face names are those of ``transformers.PhiForCausalLM``
(transformers 5.23, ``models/phi``). What is done with the table stands in ``convert.py``.

Letters of a shape: ``V`` rows of the vocabulary, padding included; ``h`` hidden size (heads x head
dimension); ``f`` inner width of the MLP; ``3h`` the q, k and v rows of all heads. Every weight
matrix is ``[out, in]``.

This module imports neither torch nor megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from phi1_megatron.config.schema import ModelConfig

How = Literal["copy", "interleave_qkv"]
"""``copy``: the same numbers. ``interleave_qkv``: Hugging Face's q, k and v matrices, each with
rows (head, dim), are one matrix of ours with rows (head, q|k|v, dim)."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the tensors of Hugging Face's that hold the same numbers.

    In the table ``{i}`` stands for the layer; ``entries`` fills it in.
    """

    megatron: str
    huggingface: tuple[str, ...]
    how: How
    shape: tuple[str, ...]


def _copy(megatron: str, huggingface: str, *shape: str) -> Entry:
    return Entry(megatron, (huggingface,), "copy", shape)


def _qkv(kind: str, *shape: str) -> Entry:
    parts = tuple(f"model.layers.{{i}}.self_attn.{part}_proj.{kind}" for part in "qkv")
    ours = f"decoder.layers.{{i}}.self_attention.linear_qkv.{kind}"
    return Entry(ours, parts, "interleave_qkv", shape)


_OURS, _THEIRS = "decoder.layers.{i}", "model.layers.{i}"

BEFORE_LAYERS: tuple[Entry, ...] = (
    _copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V", "h"),
)
EACH_LAYER: tuple[Entry, ...] = (
    _copy(f"{_OURS}.input_layernorm.weight", f"{_THEIRS}.input_layernorm.weight", "h"),
    _copy(f"{_OURS}.input_layernorm.bias", f"{_THEIRS}.input_layernorm.bias", "h"),
    _qkv("weight", "3h", "h"),
    _qkv("bias", "3h"),
    _copy(
        f"{_OURS}.self_attention.linear_proj.weight", f"{_THEIRS}.self_attn.dense.weight", "h", "h"
    ),
    _copy(f"{_OURS}.self_attention.linear_proj.bias", f"{_THEIRS}.self_attn.dense.bias", "h"),
    _copy(f"{_OURS}.mlp.linear_fc1.weight", f"{_THEIRS}.mlp.fc1.weight", "f", "h"),
    _copy(f"{_OURS}.mlp.linear_fc1.bias", f"{_THEIRS}.mlp.fc1.bias", "f"),
    _copy(f"{_OURS}.mlp.linear_fc2.weight", f"{_THEIRS}.mlp.fc2.weight", "h", "f"),
    _copy(f"{_OURS}.mlp.linear_fc2.bias", f"{_THEIRS}.mlp.fc2.bias", "h"),
)
AFTER_LAYERS: tuple[Entry, ...] = (
    _copy("decoder.final_layernorm.weight", "model.final_layernorm.weight", "h"),
    _copy("decoder.final_layernorm.bias", "model.final_layernorm.bias", "h"),
    _copy("output_layer.weight", "lm_head.weight", "V", "h"),
    _copy("output_layer.bias", "lm_head.bias", "V"),
)

COMPUTED_MEGATRON_SUFFIXES = ("._extra_state",)
"""Endings of entries in a state dict of ours that hold no weights (TransformerEngine's)."""
COMPUTED_HUGGINGFACE_SUFFIXES = (".rotary_emb.inv_freq",)
"""Endings of entries in older Hugging Face folders that the model computes for itself."""


def entries(num_layers: int) -> Iterator[Entry]:
    """The table with its layers filled in, in the order of a forward pass."""
    yield from BEFORE_LAYERS
    for layer in range(num_layers):
        for entry in EACH_LAYER:
            yield Entry(
                entry.megatron.format(i=layer),
                tuple(name.format(i=layer) for name in entry.huggingface),
                entry.how,
                entry.shape,
            )
    yield from AFTER_LAYERS


def shape_in_numbers(entry: Entry, model: ModelConfig) -> tuple[int, ...]:
    """The shape of our tensor of ``entry`` in ``model``."""
    sizes = {
        "V": model.padded_vocab_size,
        "h": model.hidden_size,
        "f": model.ffn_hidden_size,
        "3h": 3 * model.hidden_size,
    }
    return tuple(sizes[letter] for letter in entry.shape)


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every weight of ``model``, in the order of a forward pass.

    The sum of the products is the model's number of parameters: 1,418,270,720 for phi-1.
    """
    return {e.megatron: shape_in_numbers(e, model) for e in entries(model.num_layers)}


def expected_huggingface_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every weight of ``model``, in the order of a forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(model.num_layers):
        rows, *rest = shape_in_numbers(entry, model)
        for name in entry.huggingface:
            shapes[name] = (rows // len(entry.huggingface), *rest)
    return shapes


def mismatch(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    """What ``found`` lacks, has too much or has in another shape, as half a sentence; else None.

    At most eight names of each kind are listed, the rest is counted.
    """
    kinds = {
        "missing": [f"{name} {list(expected[name])}" for name in expected if name not in found],
        "not of this model": [
            f"{name} {list(found[name])}" for name in found if name not in expected
        ],
        "wrongly shaped": [
            f"{name} {list(found[name])} where {list(shape)} is expected"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    said = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    return "; ".join(said) or None


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
