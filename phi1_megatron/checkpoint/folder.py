"""What a run folder and a checkpoint folder hold, and which checkpoint is the newest whole one.

::

    RUN/config.toml                 the resolved configuration
    RUN/checkpoints/step_00000100/  one checkpoint: megatron-core's torch_dist files,
        run.json                    step, samples, layout, configuration; written last

A checkpoint is written as ``step_*.partial`` and renamed when it is whole, so a folder that lacks
``run.json`` or ends in ``.partial`` was never finished. No torch is imported here.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi1_megatron.config.load import parse_config
from phi1_megatron.config.schema import ModelConfig, RunConfig
from phi1_megatron.errors import CheckpointError, RecipeError

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Progress:
    """How far a run had come, and on which layout."""

    step: int
    consumed_samples: int
    layout: str
    """``Layout.describe()`` of the ranks that saved; random states fit the same one alone."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob("step_*") if (path / RUN_FILE).is_file()]
    return sorted(path for path in found if path.suffix != PARTIAL)


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that ``source`` means: itself, or the newest of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    source = Path(source)
    if (source / RUN_FILE).is_file() and source.suffix != PARTIAL:
        return source
    whole = list_checkpoints(source)
    if whole:
        return whole[-1]
    if not source.exists():
        raise CheckpointError(f"there is no checkpoint or run folder {source}")
    raise CheckpointError(
        f"{source} holds no whole checkpoint: neither {RUN_FILE} nor "
        f"{CHECKPOINTS}/step_*/{RUN_FILE}"
    )


def read_progress(checkpoint: Path) -> Progress:
    """Step and samples of a checkpoint."""
    record = _read_run_file(checkpoint)
    return Progress(**record["progress"])


def read_config(checkpoint: Path) -> RunConfig:
    """The configuration a checkpoint was trained with."""
    try:
        return parse_config(_read_run_file(checkpoint)["config"], source=str(checkpoint / RUN_FILE))
    except RecipeError as error:
        raise CheckpointError(
            f"the configuration in the checkpoint cannot be read: {error}"
        ) from None


def _read_run_file(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / RUN_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["progress"], record["config"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is this a checkpoint?") from None
    return record


def write_run_file(folder: Path, progress: Progress, config: RunConfig) -> None:
    """Record what a checkpoint is; its presence says the rest was written."""
    record = {
        "progress": asdict(progress),
        "config": config.model_dump(mode="json", exclude_none=True),
    }
    with (folder / RUN_FILE).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(final.name + PARTIAL)


def start_partial(final: Path) -> Path:
    """An empty folder beside ``final`` to write into; what an earlier try left there is removed."""
    partial = partial_path(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path) -> None:
    """Make a finished checkpoint the one that counts: sync every file, then rename."""
    for path in [*partial.rglob("*"), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints."""
    for path in list_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(path)


def check_same_model(checkpoint: Path, model: ModelConfig) -> None:
    """Do the checkpoint's weights fit this model?

    Raises:
        CheckpointError: they do not; the message names the first field that differs.
    """
    saved = read_config(checkpoint).model
    for field in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "padded_vocab_size",
        "rotary_percent",
        "rotary_base",
        "layernorm_epsilon",
    ):
        theirs, ours = getattr(saved, field), getattr(model, field)
        if theirs != ours:
            raise CheckpointError(
                f"{checkpoint} is a checkpoint of another model: its model.{field} is {theirs}, "
                f"the recipe's {ours}"
            )


_DATA_ORDER = (
    ("data", "blend"),
    ("data", "validation_blend"),
    ("data", "split"),
    ("data", "seq_length"),
    ("training", "seed"),
    ("training", "global_batch_size"),
)
"""What decides which samples come next."""


def check_resumable(run_dir: Path, config: RunConfig) -> None:
    """Would this configuration go on, with its model and data, where the run folder stands?

    Raises:
        CheckpointError: it would not; the message names the first field that differs.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return
    check_same_model(checkpoints[-1], config.model)
    saved = read_config(checkpoints[-1])
    for section, field in _DATA_ORDER:
        theirs, ours = (getattr(getattr(each, section), field) for each in (saved, config))
        if theirs != ours:
            raise CheckpointError(
                f"{run_dir} stands at {checkpoints[-1].name} with {section}.{field} = {theirs}; "
                f"with {ours} it could not go on through the same data in the same order: keep "
                "it, or start a new run folder (checkpoint.initialize_from takes the weights over)"
            )
