"""Process groups, seeds and teardown: the only file that touches megatron-core's parallel_state."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist

from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.cpu_device import cpu_stands_in_for_cuda
from phi1_megatron.distributed.launch import OUR_LAUNCHER, Place
from phi1_megatron.distributed.layout import Layout, plan_layout
from phi1_megatron.errors import LaunchError

Device = Literal["cpu", "cuda"]


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device a run uses: CUDA where ``auto`` finds it.

    Raises:
        LaunchError: CUDA was asked for by name and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise LaunchError(
            f"training.device is 'cuda', but torch {torch.__version__} sees no CUDA device; "
            "phi1 doctor says why, and training.device=cpu runs without"
        )
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


@contextlib.contextmanager
def parallel_context(
    config: RunConfig, place: Place | None = None, timeout_seconds: float = 1800.0
) -> Iterator[Layout]:
    """Join the ranks of a run: device, process groups, seeds; all taken down again at the end.

    Without a ``place`` this process is a group of its own: one rank, no network.

    Raises:
        LayoutError: the layout does not divide over the ranks.
        LaunchError: the device is missing, or there are more local ranks than GPUs.
    """
    layout = plan_layout(config, place.world_size if place else 1)
    device = choose_device(config.training.device)
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            torch.set_num_threads(config.training.cpu_threads)
            stack.enter_context(cpu_stands_in_for_cuda())
        else:
            _take_gpu(place)
        _join_world(place, device, timeout_seconds)
        stack.callback(dist.destroy_process_group)
        _make_model_parallel_groups(config, layout)
        stack.callback(_destroy_model_parallel_groups)
        _seed(config.training.seed)
        yield layout


def _take_gpu(place: Place | None) -> None:
    local_rank = place.local_rank if place else 0
    # Slurm may show each task only its own GPU; then every task's is number 0.
    visible = torch.cuda.device_count()
    shares_one = visible == 1 and place is not None and place.launcher in (OUR_LAUNCHER, "torchrun")
    if (visible > 1 or shares_one) and local_rank >= visible:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this host shows {visible} "
            f"(numbers 0 to {visible - 1}); start {visible} ranks a host"
        )
    torch.cuda.set_device(local_rank if visible > 1 else 0)


def _join_world(place: Place | None, device: Device, timeout_seconds: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if place is None:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.master_addr, str(place.master_port)
    dist.init_process_group(
        backend,
        init_method="env://",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )


def _make_model_parallel_groups(config: RunConfig, layout: Layout) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        context_parallel_size=layout.context,
    )


def _destroy_model_parallel_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def _seed(seed: int) -> None:
    """Seed dropout: the same on ranks that hold the same activations, different on the others."""
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    stage_seed += 10_000 * parallel_state.get_data_parallel_rank()
    torch.manual_seed(stage_seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


# --- who is where, for the rooms above (they never import parallel_state themselves) ---


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Does this rank (and model chunk) hold the embedding?"""
    from megatron.core import parallel_state

    return bool(
        parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    )


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Does this rank (and model chunk) hold the output layer, and so the loss?"""
    from megatron.core import parallel_state

    return bool(
        parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    )


def tensor_parallel_rank() -> int:
    """This rank's place among those that share each matrix."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank())


def tensor_parallel_size() -> int:
    """Ranks that share each matrix."""
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_world_size())


def data_parallel_rank() -> int:
    """This rank's place among the copies of the model."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same share of the model, with the context-parallel ones."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def last_stage_rank() -> int:
    """Global rank of the last pipeline stage on this rank's pipeline."""
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_last_rank())


def pipeline_group() -> dist.ProcessGroup:
    """The stages of this rank's pipeline."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group
