"""The README.md of an exported model: what it is, how it was made, what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from phi1_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelCard:
    """What the card tells besides the architecture; all of it optional."""

    title: str = "phi-1"
    source: str | None = None
    """Name of the checkpoint the weights come from."""
    step: int | None = None
    """Optimizer steps it had seen."""
    data: tuple[str, ...] = ()
    """Names of the training data sets."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name → value, at that step."""
    recipe: str | None = None
    """The resolved recipe as TOML."""


def render_card(
    card: ModelCard,
    model: ModelConfig,
    parameters: int,
    dtype: torch.dtype,
    has_tokenizer: bool,
) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads."""
    weights = str(dtype).removeprefix("torch.")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [phi, code, phi1-megatron]",
        "---",
        "",
        f"# {card.title}",
        "",
        "A language model for code with the architecture of phi-1 "
        "(Gunasekar et al., [Textbooks Are All You Need](https://arxiv.org/abs/2306.11644)), "
        "trained and exported with phi1_megatron.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| layers x hidden x heads | {model.num_layers} x {model.hidden_size} x "
        f"{model.num_attention_heads} |",
        f"| MLP width | {model.ffn_hidden_size} |",
        f"| longest sequence | {model.max_position_embeddings} tokens |",
        f"| vocabulary | {model.vocab_size} tokens in {model.padded_vocab_size} rows |",
        f"| weights | {weights} |",
    ]
    if card.source is not None:
        lines.append(f"| checkpoint | {card.source} |")
    if card.step is not None:
        lines.append(f"| training steps | {card.step:,} |")
    lines += ["", "## Use", "", "```python", *_usage(has_tokenizer), "```"]
    if card.metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in card.metrics.items()]
    if card.data:
        lines += ["", "## Data", "", *[f"- `{name}`" for name in card.data]]
    if card.recipe is not None:
        lines += ["", "## Recipe", "", "```toml", card.recipe.strip(), "```"]
    return "\n".join(lines) + "\n"


def _usage(has_tokenizer: bool) -> list[str]:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if not has_tokenizer:
        return [lines[0].removesuffix(", AutoTokenizer"), *lines[1:]]
    return [
        *lines,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'inputs = tokenizer("def add(a, b):", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=64)",
        "# True would remove spaces that code needs.",
        "print(tokenizer.decode(output[0], clean_up_tokenization_spaces=False))",
    ]
