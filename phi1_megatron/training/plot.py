"""The picture of a run: training and validation loss over tokens."""

from __future__ import annotations

import os
from pathlib import Path

from phi1_megatron.training.metrics import read_metrics


def plot_losses(metrics: Path, target: Path, unigram_entropy: float | None = None) -> None:
    """Draw ``metrics.jsonl`` as a PNG; does nothing where no step was recorded.

    Args:
        unigram_entropy: of the corpus, in nats a token: what a model that knows only how frequent
            each token is would reach. Drawn as a line where given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(read_metrics(metrics))
    if not lines:
        return
    tokens = [line["consumed_tokens"] / 1e6 for line in lines]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, [line["loss"] for line in lines], color="#2a6f97", lw=1.2, label="training")
    validated = [line for line in lines if line.get("validation_loss") is not None]
    if validated:
        axes.plot(
            [line["consumed_tokens"] / 1e6 for line in validated],
            [line["validation_loss"] for line in validated],
            "o-",
            color="#d1495b",
            ms=4,
            label="validation",
        )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#6c757d", ls="--", lw=1, label="unigram entropy")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"{lines[-1]['step']:,} steps, last training loss {lines[-1]['loss']:.3f}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    aside = target.with_suffix(".partial.png")
    figure.savefig(aside)
    os.replace(aside, target)
