"""The CPU standing in for CUDA under megatron-core.

megatron-core names CUDA outright in over a hundred places of its training path: it allocates with
``device="cuda"``, asks for the current device and stream, and checks tensor types by name. This
module answers those questions with the CPU, so that the very same schedules, optimizers and layers
run on a laptop. Nothing of megatron-core is changed but the two functions that fetch and restore
the CUDA generator's state, which become the CPU generator's.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CpuForCuda(TorchFunctionMode):
    """Answers a ``cuda`` device with the CPU in every torch call made under it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _names_cuda(device):
                kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(argument) else argument for argument in args)
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core picks optimizer groups by names such as 'torch.cuda.FloatTensor'.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs) if kwargs else func(*args)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """A stream that is always done: the CPU runs calls in order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """An event that records the wall clock."""

    def __init__(self, *_: object, **__: object) -> None:
        self._time = 0.0

    def record(self, stream: object = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to ``end``."""
        return 1000.0 * (end._time - self._time)


def _ignore(*_: object, **__: object) -> None:
    """Stands in for what has nothing to do on a CPU."""


def _zero(*_: object, **__: object) -> int:
    """Stands in for counters of CUDA memory, which the CPU does not have."""
    return 0


def _not_about_the_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


@contextlib.contextmanager
def cpu_stands_in_for_cuda() -> Iterator[None]:
    """Within this context, megatron-core's CUDA calls run on the CPU.

    Raises:
        RuntimeError: CUDA is in use in this process already.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("the CPU cannot stand in for CUDA once CUDA has been initialized")
    from megatron.core.tensor_parallel import random as megatron_random

    stream = _Stream()
    cuda_answers: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": _ignore,
        "synchronize": _ignore,
        "empty_cache": _ignore,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "reset_peak_memory_stats": _ignore,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    random_answers: dict[str, Any] = {
        "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    with contextlib.ExitStack() as stack:
        for owner, answers in ((torch.cuda, cuda_answers), (megatron_random, random_answers)):
            for name, answer in answers.items():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, answer)
        # It warns when the CPU's generator moves under CUDA's name; here that is the point.
        log = logging.getLogger(megatron_random.__name__)
        log.addFilter(_not_about_the_generator)
        stack.callback(log.removeFilter, _not_about_the_generator)
        stack.enter_context(CpuForCuda())
        yield
