"""The CPU answering for CUDA: what megatron-core asks, and nothing left behind."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from phi1_megatron.distributed.cpu_device import cpu_stands_in_for_cuda

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where CUDA is, nothing has to stand in for it"
)
CUDA_NAMES = [
    "current_device",
    "device_count",
    "set_device",
    "synchronize",
    "manual_seed",
    "get_rng_state",
    "set_rng_state",
    "memory_allocated",
    "Stream",
    "Event",
    "current_stream",
    "stream",
]


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)]
)
def test_a_tensor_asked_for_on_cuda_is_made_on_the_cpu(device: str | torch.device) -> None:
    with cpu_stands_in_for_cuda():
        for tensor in (
            torch.zeros(3, device=device),
            torch.empty(3, dtype=torch.bfloat16, device=device),
            torch.tensor([1, 2], device=device),
            torch.zeros(3).to(device),
            torch.zeros(3).to(device=device),
            torch.zeros(3).cuda(),
            torch.nn.Linear(2, 2, device=device).weight,
        ):
            assert tensor.device == torch.device("cpu")


def test_what_is_asked_for_elsewhere_stays_there() -> None:
    with cpu_stands_in_for_cuda():
        assert torch.zeros(3, device="meta").device.type == "meta"
        assert torch.zeros(3).to("meta").device.type == "meta"
        assert torch.zeros(3).to(torch.float16).dtype == torch.float16


def test_the_current_device_takes_tensors_and_modules() -> None:
    with cpu_stands_in_for_cuda():
        here = torch.cuda.current_device()
        assert torch.zeros(3, device=here).device.type == "cpu"
        module = torch.nn.Linear(2, 2).cuda(here)
        assert module.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
    ],
)
def test_types_have_the_names_by_which_megatron_core_sorts_parameters(
    dtype: torch.dtype, name: str
) -> None:
    with cpu_stands_in_for_cuda():
        assert torch.zeros(1, dtype=dtype).type() == name
        assert torch.zeros(1).type(dtype).dtype == dtype  # a change of type is still one


def test_a_random_state_taken_and_set_again_gives_the_same_numbers() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    with cpu_stands_in_for_cuda():
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        assert not torch.equal(torch.rand(4), first)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        megatron_random._set_cuda_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        megatron_random._set_cuda_rng_state(state)
        assert torch.equal(megatron_random._get_cuda_rng_state(), state)


def test_megatron_core_s_tracker_forks_and_returns_to_the_common_stream() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with cpu_stands_in_for_cuda():
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(1)
        tracker.add("dropout", 2)
        torch.manual_seed(1)
        alone = torch.rand(2)
        torch.manual_seed(1)
        with tracker.fork("dropout"):
            forked = torch.rand(2)
        assert torch.equal(torch.rand(2), alone)
        torch.manual_seed(2)
        assert torch.equal(torch.rand(2), forked)


def test_streams_and_events_are_there_and_always_done() -> None:
    with cpu_stands_in_for_cuda():
        stream = torch.cuda.Stream()
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        time.sleep(0.01)
        with torch.cuda.stream(stream):
            end = stream.record_event()
        stream.wait_stream(torch.cuda.current_stream())
        end.synchronize()
        assert stream.query()
        assert 10.0 <= start.elapsed_time(end) < 10_000.0  # milliseconds


def test_everything_is_as_before_afterwards_after_an_error_too() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    before = [getattr(torch.cuda, name) for name in CUDA_NAMES]
    before += [megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state]
    with contextlib.suppress(KeyError), cpu_stands_in_for_cuda():
        assert torch.cuda.current_device is not before[0]
        raise KeyError
    after = [getattr(torch.cuda, name) for name in CUDA_NAMES]
    after += [megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_it_can_be_entered_twice_and_left_once() -> None:
    with cpu_stands_in_for_cuda():
        with cpu_stands_in_for_cuda():
            pass
        assert torch.zeros(1, device="cuda").device.type == "cpu"


def test_it_refuses_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(RuntimeError, match="once CUDA has been initialized"),
        cpu_stands_in_for_cuda(),
    ):
        pass
