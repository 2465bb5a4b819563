"""A checkpoint of ours as a Hugging Face folder, proved by its logits; or found where it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from phi1_megatron.checkpoint.convert import (
    LogitsComparison,
    compare_logits,
    export_huggingface,
    verification_tokens,
)
from phi1_megatron.checkpoint.folder import (
    CHECKPOINTS,
    find_checkpoint,
    read_config,
    read_progress,
)
from phi1_megatron.checkpoint.hf_folder import MANIFEST
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.checkpoint.model_card import ModelCard
from phi1_megatron.checkpoint.weights import open_weights
from phi1_megatron.config.load import to_toml
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Exported:
    """What ``export_checkpoint`` made."""

    checkpoint: Path
    target: Path
    num_bytes: int
    """Bytes of weights."""
    comparison: LogitsComparison | None
    """The logits of both forms; None where it was not asked for."""


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    verify: bool = True,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Export a checkpoint, or the newest one of a run folder, for transformers.

    Args:
        source: a checkpoint or a run folder.
        target: the folder to make.
        dtype: type to write; by default the checkpoint's.
        tokenizer: its folder; by default the one that the run's configuration names.
        verify: compare the logits of both forms before the folder gets its name. Both see the
            numbers that were written, so rounding to ``dtype`` is no difference.
        force: replace an earlier export.
        on_progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: ``target`` is not free, or the tokenizer is not there or does not fit.
        CheckpointError: there is no whole checkpoint, or the logits differ.
    """
    checkpoint = find_checkpoint(source)
    config = read_config(checkpoint)
    reader = open_weights(checkpoint)
    wrong = set(expected_shapes(config.model)).symmetric_difference(reader.names())
    if wrong:
        raise CheckpointError(
            f"{checkpoint} does not hold the weights of its own configuration: "
            f"{', '.join(sorted(wrong)[:8])} in one of them alone"
        )
    comparisons: list[LogitsComparison] = []

    def compare(staging: Path) -> None:
        from phi1_megatron.models.phi1 import reference_forward

        forward = reference_forward(
            config.model, lambda name: reader.read(name).to(dtype) if dtype else reader.read(name)
        )
        comparisons.append(compare_logits(forward, staging, verification_tokens(config.model)))
        comparisons[-1].require()

    named = config.data.tokenizer
    num_bytes = export_huggingface(
        reader.read,
        config.model,
        target,
        tokenizer=tokenizer or (Path(named) if named else None),
        dtype=dtype,
        force=force,
        card=_card(checkpoint, config),
        verify=compare if verify else None,
        on_progress=on_progress,
    )
    return Exported(checkpoint, target, num_bytes, comparisons[0] if comparisons else None)


def exported_folder(source: Path, *, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """A Hugging Face folder of ``source``: itself where it is one, else a cached export.

    The export of a checkpoint lies in ``RUN/exports/``, named after the checkpoint and a hash of
    its files' names, sizes and times, and is made where it is not there yet.
    """
    if (source / "config.json").is_file():
        return source
    checkpoint = find_checkpoint(source)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    target = _run_folder(checkpoint) / "exports" / f"{checkpoint.name}-{key}"
    if not (target / MANIFEST).is_file():
        export_checkpoint(checkpoint, target, on_progress=on_progress)
    return target


def _run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint lies in; for one that was moved, the folder it lies in now."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def _card(checkpoint: Path, config: RunConfig) -> ModelCard:
    step = read_progress(checkpoint).step
    metrics: dict[str, float] = {}
    log = _run_folder(checkpoint) / "metrics.jsonl"
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            if not line.endswith("}"):
                break  # a line that is being written
            record = json.loads(line)
            if record["step"] > step:
                continue
            for name in ("loss", "validation_loss", "consumed_tokens"):
                if record.get(name) is not None:
                    metrics[name.replace("_", " ")] = record[name]
    return ModelCard(
        source=checkpoint.name,
        step=step,
        data=tuple(Path(part.prefix).name for part in config.data.blend),
        metrics=metrics,
        recipe=to_toml(config),
    )
