"""Save and load: megatron-core's ``dist_checkpointing``, one tensor a weight, any layout.

Weights are stored under their names in the whole model (``decoder.layers.7.mlp.linear_fc1.weight``)
and optimizer moments in the weights' shapes (megatron-core's ``fully_reshardable`` form), so that
a checkpoint does not know which layout wrote it.
"""

from __future__ import annotations

import queue
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from phi1_megatron.checkpoint.folder import (
    Progress,
    check_same_model,
    checkpoint_path,
    commit,
    find_checkpoint,
    partial_path,
    prune,
    read_progress,
    start_partial,
    write_run_file,
)
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.errors import CheckpointError
from phi1_megatron.models.phi1 import unwrap

_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}
"""megatron-core's words for: moments in the weights' shapes, layers under their own names."""


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint holds: what the next step depends on."""

    chunks: list[nn.Module]
    optimizer: Any
    scheduler: Any


def save_checkpoint(
    run_dir: Path, config: RunConfig, state: TrainingState, progress: Progress
) -> Path:
    """Write a checkpoint on all ranks; it appears whole or not at all.

    Raises:
        CheckpointError: it could not be written; nothing of it is left behind.
    """
    _collect_results_in_this_process()
    final = checkpoint_path(run_dir, progress.step)
    partial = partial_path(final)
    try:
        if dist.get_rank() == 0:
            start_partial(final)
        dist.barrier()
        sharded = _sharded_state(state, is_loading=False)
        sharded["random"] = _random_state(_collect_random_state())
        dist_checkpointing.save(sharded, str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            write_run_file(partial, progress, config)
            commit(partial, final)
            prune(run_dir, config.checkpoint.keep_last)
    except (OSError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]  # its own text is every rank's traceback
        raise CheckpointError(f"the checkpoint {final} could not be written: {cause}") from error
    dist.barrier()
    return final


def _collect_results_in_this_process() -> None:
    """Give megatron-core's writer a queue in this process for what its workers wrote.

    It would start a server process on every rank for that, some 200 MB each, which only a save in
    the background needs, and which outlives a rank that is killed.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load_checkpoint(checkpoint: Path, state: TrainingState, layout: str) -> Progress:
    """Fill model, optimizer and schedule from a checkpoint, whatever layout saved it.

    Random states are restored where the layout is the same one; another layout draws new ones.
    """
    progress = read_progress(checkpoint)
    sharded = _sharded_state(state, is_loading=True)
    same_layout = progress.layout == layout
    if same_layout:
        sharded["random"] = _random_state(None)
    loaded = _load(checkpoint, sharded)
    _load_weights(state.chunks, loaded)
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        _restore_random_state(loaded["random"])
    return progress


def load_weights(source: Path, config: RunConfig, chunks: list[nn.Module]) -> Path:
    """Fill the model alone, from a checkpoint or the newest one of a run folder.

    Raises:
        CheckpointError: there is none, or it is of another model.
    """
    checkpoint = find_checkpoint(source)
    check_same_model(checkpoint, config.model)
    sharded = {
        _chunk_key(index): unwrap(chunk).sharded_state_dict(metadata=dict(_FORMAT))
        for index, chunk in enumerate(chunks)
    }
    _load_weights(chunks, _load(checkpoint, sharded))
    return checkpoint


def _load(checkpoint: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(checkpoint))
    except (OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return loaded


def _sharded_state(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    """Everything but random states, in megatron-core's sharded form."""
    sharded: dict[str, Any] = {}
    for index, chunk in enumerate(state.chunks):
        sharded[_chunk_key(index)] = unwrap(chunk).sharded_state_dict(metadata=dict(_FORMAT))
    weights = (
        sharded[_chunk_key(0)]
        if len(state.chunks) == 1
        else {key: sharded[key] for key in map(_chunk_key, range(len(state.chunks)))}
    )
    sharded["optimizer"] = state.optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata=dict(_FORMAT)
    )
    sharded["scheduler"] = state.scheduler.state_dict()
    return sharded


def _load_weights(chunks: list[nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[_chunk_key(index)])


def _chunk_key(index: int) -> str:
    return f"model{index}"


def _random_state(value: Any) -> ShardedObject:
    """Each rank's own random state, by its place among all of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return ShardedObject("random", value, (world_size,), (rank,), replica_id=0)


def _collect_random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(saved: dict[str, Any]) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    torch.cuda.set_rng_state(saved["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["tracker"])
