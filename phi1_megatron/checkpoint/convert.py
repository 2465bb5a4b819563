"""Weights of ours to Hugging Face's and back, one tensor at a time, and the proof that they agree.

Tensors: matrices are ``[out, in]``. ``n`` heads of ``d`` dimensions make ``h = n * d``. Our
``linear_qkv`` is ``[n * 3 * d, h]`` with rows (head, q|k|v, dim); Hugging Face has three matrices
``[n * d, h]`` with rows (head, dim). Nothing is computed, only moved: both ways are bit-exact.
Tokens are ``[b, s]`` int64, logits ``[b, s, V]`` fp32, ``V`` the padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phi1_megatron.checkpoint.hf_folder import (
    MANIFEST,
    copy_tokenizer,
    generation_config,
    huggingface_config,
    open_tokenizer,
    quiet_transformers,
    read_model_config,
    staged_folder,
    write_json,
)
from phi1_megatron.checkpoint.hf_mapping import (
    COMPUTED_MEGATRON_SUFFIXES,
    entries,
    expected_huggingface_shapes,
    expected_shapes,
    mismatch,
    shape_in_numbers,
)
from phi1_megatron.checkpoint.hf_weights import HuggingFaceWeights, write_weights
from phi1_megatron.checkpoint.model_card import ModelCard, render_card
from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.errors import CheckpointError

Read = Callable[[str], Tensor]
"""Gives the tensor of a name; called once for each name."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
# fp32 on both sides; step 2 of the correctness ladder holds small models to 1e-5 of the largest.
LOGITS_TOLERANCE = 1e-4


# ---- tensors ---------------------------------------------------------------------------------


def interleave_qkv(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Three ``[n * d, ...]`` with rows (head, dim) to one ``[n * 3 * d, ...]`` (head, qkv, dim)."""
    parts = [part.unflatten(0, (num_heads, -1)) for part in (query, key, value)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def split_qkv(fused: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`interleave_qkv`."""
    query, key, value = fused.unflatten(0, (num_heads, 3, -1)).unbind(dim=1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def megatron_to_huggingface(
    weights: Mapping[str, Tensor] | Read, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and tensor of every weight, in the order of a forward pass.

    Args:
        weights: our tensors by canonical name, or a function that reads one.

    Raises:
        CheckpointError: tensors are missing, extra or wrongly shaped; they are named. A mapping
            is checked as a whole before the first tensor, a function as it reads.
    """
    if isinstance(weights, Mapping):
        _check_names(
            {k: t for k, t in weights.items() if not k.endswith(COMPUTED_MEGATRON_SUFFIXES)},
            expected_shapes(model),
        )
    read = weights.__getitem__ if isinstance(weights, Mapping) else weights
    for entry in entries(model.num_layers):
        tensor = _read_checked(read, entry.megatron, shape_in_numbers(entry, model))
        if entry.how == "copy":
            yield entry.huggingface[0], tensor
        else:
            parts = split_qkv(tensor, model.num_attention_heads)
            yield from zip(entry.huggingface, parts, strict=True)


def huggingface_to_megatron(
    weights: Mapping[str, Tensor] | Read, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Our canonical name and tensor of every weight: the inverse of megatron_to_huggingface."""
    shapes = expected_huggingface_shapes(model)
    if isinstance(weights, Mapping):
        _check_names(weights, shapes)
    read = weights.__getitem__ if isinstance(weights, Mapping) else weights
    for entry in entries(model.num_layers):
        parts = [_read_checked(read, name, shapes[name]) for name in entry.huggingface]
        if entry.how == "copy":
            yield entry.megatron, parts[0]
        else:
            query, key, value = parts
            yield entry.megatron, interleave_qkv(query, key, value, model.num_attention_heads)


def _check_names(weights: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    wrong = mismatch({name: tuple(tensor.shape) for name, tensor in weights.items()}, expected)
    if wrong:
        raise CheckpointError(f"the weights are not those of the model's configuration: {wrong}")


def _read_checked(read: Read, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} is {list(tensor.shape)} where the model's configuration makes it {list(shape)}"
        )
    return tensor


# ---- folders ---------------------------------------------------------------------------------


def export_huggingface(
    read: Read,
    model: ModelConfig,
    target: Path,
    *,
    tokenizer: Path | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    card: ModelCard | None = None,
    verify: Callable[[Path], object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; return its bytes of
    weights.

    The folder appears whole or not at all. One tensor is held in memory at a time.

    Args:
        read: gives our tensor of a canonical name.
        model: the architecture.
        target: the folder to make; its parents are made too.
        tokenizer: folder of the tokenizer to copy; without it none is in the export.
        dtype: type to write; by default the type that the weights have.
        max_shard_bytes: a weights file grows no larger, unless by a single tensor.
        force: replace an earlier export.
        card: what the model card tells besides the architecture.
        verify: called with the finished folder before it gets its name; raises to refuse it.
        on_progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        UsageError: ``target`` is not free, or the tokenizer does not fit.
        CheckpointError: a tensor has another shape or type, is not finite or does not fit
            ``dtype``; or the folder cannot be written.
    """
    opened, end_of_text = open_tokenizer(tokenizer, model)
    shapes = expected_huggingface_shapes(model)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    with staged_folder(target, force=force) as staging:
        if dtype is None:
            dtype = read("decoder.final_layernorm.weight").dtype
            read = _of_one_type(read, dtype)
        write_json(staging / "config.json", huggingface_config(model, dtype, end_of_text))
        write_json(staging / "generation_config.json", generation_config(end_of_text))
        if opened is not None and tokenizer is not None:
            copy_tokenizer(opened, tokenizer, staging)
        total, done = parameters * dtype.itemsize, 0
        tensors = megatron_to_huggingface(read, model)
        for _, size in write_weights(staging, shapes, tensors, dtype, max_shard_bytes):
            done += size
            if on_progress is not None:
                on_progress(done, total)
        card = card or ModelCard()
        (staging / "README.md").write_text(
            render_card(card, model, parameters, dtype, tokenizer is not None), encoding="utf-8"
        )
        write_json(
            staging / MANIFEST,
            {"format": 1, "source": card.source, "step": card.step, "model": model.model_dump()},
        )
        if verify is not None:
            verify(staging)
    return total


def _of_one_type(read: Read, dtype: torch.dtype) -> Read:
    def checked(name: str) -> Tensor:
        tensor = read(name)
        if tensor.dtype != dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype} and decoder.final_layernorm.weight {dtype}; "
                "say which type to write (--dtype)"
            )
        return tensor

    return checked


def import_huggingface(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The architecture of a Hugging Face folder, and its weights under our canonical names.

    Configuration, file headers, names and shapes are checked before this returns; the numbers
    (NaN, infinity) as the iterator reads them, one tensor at a time, in their stored type.

    Raises:
        CheckpointError: it is not a whole ``PhiForCausalLM`` folder; the sentence says what is
            missing, extra, wrongly shaped, truncated or not finite.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    model = read_model_config(folder)
    return model, huggingface_to_megatron(HuggingFaceWeights(folder, model).read, model)


# ---- proof -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitsComparison:
    """How far two forms of one model are apart on the same tokens, both computed in fp32."""

    max_abs_difference: float
    """Largest difference of two logits; NaN where one of them is."""
    largest_logit: float
    """Largest magnitude among the Hugging Face form's logits."""
    num_tokens: int
    """Positions compared, each with all its logits."""

    @property
    def max_rel_difference(self) -> float:
        """The largest difference relative to the largest logit."""
        return self.max_abs_difference / max(self.largest_logit, torch.finfo(torch.float32).tiny)

    def require(self, tolerance: float = LOGITS_TOLERANCE) -> None:
        """Raise ``CheckpointError`` unless ``max_rel_difference`` is within ``tolerance``."""
        if not self.max_rel_difference <= tolerance:
            raise CheckpointError(
                f"the exported model is not the same: its logits differ by up to "
                f"{self.max_abs_difference:.3g} ({self.max_rel_difference:.3g} of the largest, "
                f"{self.largest_logit:.3g}; {tolerance:g} is allowed); nothing was written"
            )


def verification_tokens(model: ModelConfig) -> Tensor:
    """Fixed prompts ``[2, s]`` int64: the same random tokens of the real vocabulary every time."""
    length = min(64, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (2, length), generator=generator)


def compare_logits(
    ours: Callable[[Tensor], Tensor], folder: Path, tokens: Tensor
) -> LogitsComparison:
    """Compare the logits of ``ours`` and of the Hugging Face folder on ``tokens [b, s]``.

    Both run in fp32 on the CPU, whatever type the weights are stored in, so that what is measured
    is the conversion and not the rounding of half-precision arithmetic.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        wanted = theirs(tokens).logits
        del theirs
        given = ours(tokens)
    if given.shape != wanted.shape:
        raise CheckpointError(
            f"our logits are {list(given.shape)} and those of {folder} {list(wanted.shape)}"
        )
    return LogitsComparison(
        max_abs_difference=(given.float() - wanted).abs().max().item(),
        largest_logit=wanted.abs().max().item(),
        num_tokens=tokens.numel(),
    )
