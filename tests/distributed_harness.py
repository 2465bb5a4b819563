"""Run a function on several real gloo ranks, each a process of its own.

The processes are forked from a server that has imported torch and megatron-core once, so eight
ranks start in a second; none of them shares state with another test.
"""

from __future__ import annotations

import io
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

from phi1_megatron.config.load import parse_config
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.launch import Place

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed_preload"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """``function(place, *args)`` on every rank; its results by rank.

    The function must be importable (a module's own). The first rank that raises fails the test
    with its traceback, and the others are ended.
    """
    port = _free_port()
    pipes: list[Connection] = []
    ranks = []
    for rank in range(world_size):
        receive, send = _CONTEXT.Pipe(duplex=False)
        place = Place(rank, world_size, rank, "test", "127.0.0.1", port)
        process = _CONTEXT.Process(target=_be_rank, args=(send, function, place, args))
        process.start()
        send.close()
        pipes.append(receive)
        ranks.append(process)
    try:
        return _collect(pipes, timeout_seconds)
    finally:
        for process in ranks:
            process.join(timeout=5)  # one that hangs in a collective is killed
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=timeout_seconds)
        if not ready:
            pytest.fail(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not answer")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                ok, payload = pipe.recv()
            except EOFError:
                pytest.fail(f"rank {rank} died without a word")
            if not ok:
                pytest.fail(f"rank {rank} failed:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _be_rank(
    pipe: Connection, function: Callable[..., Any], place: Place, args: tuple[Any, ...]
) -> None:
    try:
        buffer = io.BytesIO()
        torch.save(function(place, *args), buffer)
        pipe.send((True, buffer.getvalue()))
    except BaseException:  # noqa: BLE001 - whatever it was, the test tells it
        pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """A phi-1 of four small layers without dropout; sections are laid over it."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "vocab_size": 100,
            "make_vocab_size_divisible_by": 64,
            "max_position_embeddings": 32,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
        "parallel": {},
        "data": {"blend": ["unused"], "seq_length": 32, "split": [80.0, 20.0, 0.0]},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"warmup_steps": 1},
        "training": {
            "train_steps": 5,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "precision": "fp32",
            "device": "cpu",
            "eval_interval": 0,
        },
        "checkpoint": {"save_interval": 0},
        "logging": {"tensorboard": False},
    }
    for name, fields in sections.items():
        tree.setdefault(name, {}).update(fields)
    return parse_config(tree, source="test")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"use_distributed_optimizer": False}),
    "tp2_sp_pp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
        },
    ),
    "tp2_sp_pp2_vpp2_dp2": (
        8,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
}
"""Layouts that CI proves: ranks, and the ``parallel`` section."""
