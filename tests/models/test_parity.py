"""Logits, losses and gradients of every layout equal ``transformers.PhiForCausalLM``'s.

Weights and biases are random (transformers starts biases at zero, which would hide a lost one).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from phi1_megatron.checkpoint.convert import huggingface_to_megatron, megatron_to_huggingface
from phi1_megatron.config.schema import ModelConfig, RunConfig
from phi1_megatron.distributed.initialize import (
    data_parallel_rank,
    is_last_stage,
    parallel_context,
    tensor_parallel_rank,
)
from phi1_megatron.distributed.launch import Place
from phi1_megatron.models.phi1 import build_model, named_weights
from tests.distributed_harness import LAYOUTS, run_ranks, tiny_config

pytestmark = pytest.mark.distributed

Shards = dict[str, tuple[Tensor, int | None, int]]
"""Each weight's share on one rank, the dimension it is split along, the tensor-parallel rank."""


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """PhiForCausalLM on random weights: tokens, logits, loss, and gradients by our names."""
    config = tiny_config()
    model = config.model
    generator = torch.Generator().manual_seed(11)
    phi = PhiForCausalLM(_phi_config(model)).train()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    length = config.data.seq_length + 1
    text = torch.randint(0, model.vocab_size, (8, length), generator=generator)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    logits = phi(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in phi.named_parameters()}
    return {
        "weights": dict(huggingface_to_megatron(phi.state_dict(), model)),
        "tokens": tokens,
        "labels": labels,
        "logits": logits.detach(),
        "loss": loss.item(),
        "gradients": dict(huggingface_to_megatron(gradients, model)),
    }


def _phi_config(model: ModelConfig) -> PhiConfig:
    return PhiConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        attn_implementation="eager",
    )


@pytest.mark.parametrize("layout", ["tp1", *LAYOUTS])
def test_logits_loss_and_every_gradient_equal_those_of_transformers(
    layout: str, reference: dict[str, Any]
) -> None:
    world_size, parallel = LAYOUTS.get(layout, (1, {}))
    config = tiny_config(parallel=parallel)
    answers = run_ranks(
        world_size,
        _forward_and_backward,
        config,
        reference["weights"],
        reference["tokens"],
        reference["labels"],
    )
    logits = _gather_logits(answers)
    scale = reference["logits"].abs().max()
    assert (logits - reference["logits"]).abs().max() <= 1e-5 * scale
    for answer in answers:
        assert answer["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    gradients = gather_shards([answer["gradients"] for answer in answers])
    assert gradients.keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        difference = torch.linalg.norm(gradients[name] - expected) / torch.linalg.norm(expected)
        assert difference <= 1e-5, f"{name}: relative difference {difference:.2e}"


def _forward_and_backward(
    place: Place, config: RunConfig, weights: dict[str, Tensor], tokens: Tensor, labels: Tensor
) -> dict[str, Any]:
    """On one rank: logits of its own share, the loss and the gradients after a whole step."""
    from phi1_megatron.training.optimizer import build_optimizer, wrap_data_parallel
    from phi1_megatron.training.step import run_schedule

    with parallel_context(config, place if place.world_size > 1 else None) as layout:
        bare = build_model(config, "cpu")
        fill(bare, weights)
        # The plain optimizer leaves whole gradients on every data-parallel rank.
        plain = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"use_distributed_optimizer": False})
            }
        )
        chunks = wrap_data_parallel(plain, bare)
        build_optimizer(plain, chunks)
        rank = data_parallel_rank()

        def batches() -> list[Iterator[dict[str, Tensor]]]:
            return [micro_batches_of(tokens, labels, layout.data, rank) for _ in range(len(chunks))]

        logits = forward_logits(config, layout, chunks, batches())
        loss = run_schedule(config, layout, chunks, batches())
        gradients: Shards = {
            name: (cast(Any, p).main_grad.clone(), split_dimension(p), tensor_parallel_rank())
            for name, p in named_weights(chunks)
        }
        last = is_last_stage()
        return {
            "loss": loss,
            "gradients": gradients,
            "logits": (rank, tensor_parallel_rank(), logits) if last else None,
        }


def micro_batches_of(
    tokens: Tensor, labels: Tensor, data_ranks: int, data_rank: int
) -> Iterator[dict[str, Tensor]]:
    """One sample at a time, dealt to the data-parallel ranks in turn."""
    positions = torch.arange(tokens.shape[1])[None]
    for row in range(data_rank, tokens.shape[0], data_ranks):
        yield {
            "tokens": tokens[row : row + 1],
            "labels": labels[row : row + 1],
            "loss_mask": torch.ones(1, tokens.shape[1]),
            "position_ids": positions,
        }


def forward_logits(config: RunConfig, layout: Any, chunks: list[Any], batches: list[Any]) -> Any:
    """This rank's share of the logits, ``[b, s, V / tp]``; None off the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda logits: (logits.new_zeros(()), logits.detach().clone())

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=layout.num_microbatches,
            seq_length=config.data.seq_length,
            micro_batch_size=1,
            forward_only=True,
        )
    return torch.cat(outputs) if outputs else None


def fill(chunks: list[Any], weights: dict[str, Tensor]) -> None:
    """Copy each rank's share of whole weights into a model."""
    with torch.no_grad():
        for name, parameter in named_weights(chunks):
            whole, dimension = weights[name], split_dimension(parameter)
            if dimension is not None:
                size = parameter.shape[dimension]
                whole = whole.narrow(dimension, tensor_parallel_rank() * size, size)
            parameter.copy_(whole)


def split_dimension(parameter: Any) -> int | None:
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)
    return None


def gather_shards(ranks: list[Shards]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' shares; copies on other ranks must agree."""
    found: dict[str, dict[int, Tensor]] = {}
    dimensions: dict[str, int | None] = {}
    for shards in ranks:
        for name, (tensor, dimension, tensor_rank) in shards.items():
            place = tensor_rank if dimension is not None else 0
            earlier = found.setdefault(name, {}).setdefault(place, tensor)
            torch.testing.assert_close(tensor, earlier, rtol=0, atol=1e-7, msg=lambda m: m)
            dimensions[name] = dimension
    return {
        name: shares[0]
        if dimensions[name] is None
        else torch.cat([shares[i] for i in sorted(shares)], dim=dimensions[name] or 0)
        for name, shares in found.items()
    }


def _gather_logits(answers: list[dict[str, Any]]) -> Tensor:
    """The whole batch's logits: vocabulary shares side by side, data ranks in turn."""
    shares = {answer["logits"][:2]: answer["logits"][2] for answer in answers if answer["logits"]}
    data_ranks = 1 + max(data for data, _ in shares)
    tensor_ranks = 1 + max(tensor for _, tensor in shares)
    rows = [
        torch.cat([shares[data, tensor] for tensor in range(tensor_ranks)], dim=-1)
        for data in range(data_ranks)
    ]
    return torch.stack(rows, dim=1).flatten(0, 1)


def test_gelu_is_the_tanh_form_that_megatron_core_fuses_on_a_gpu() -> None:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    from phi1_megatron.models.transformer_config import tanh_gelu

    x, bias = torch.linspace(-4, 4, 101), torch.linspace(-1, 1, 101)
    with torch.compiler.set_stance("force_eager"):
        fused = bias_gelu(bias, x)
    torch.testing.assert_close(fused, tanh_gelu(x + bias), rtol=1e-5, atol=1e-5)


def test_weights_and_gradients_of_the_reference_survive_the_name_table(
    reference: dict[str, Any],
) -> None:
    model = tiny_config().model
    back = dict(megatron_to_huggingface(reference["weights"], model))
    again = dict(huggingface_to_megatron(back, model))
    assert all(torch.equal(again[name], tensor) for name, tensor in reference["weights"].items())
