"""What a run tells of itself: ``metrics.jsonl``, TensorBoard, a plot and a progress bar.

Only rank 0 writes. ``metrics.jsonl`` has one object a step; floats are written at full precision,
so that two runs can be compared bit by bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from phi1_megatron.config.schema import RunConfig


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    step: int
    """Optimizer steps done, counting this one."""
    loss: float
    """Mean training loss of this step's global batch, in nats a token."""
    grad_norm: float | None
    """Norm of the whole gradient before clipping; None where the step was skipped."""
    learning_rate: float
    consumed_tokens: int
    """Tokens trained on since the run began."""
    tokens_per_second: float
    """Over all ranks, for this step alone; saving and validating not counted."""
    loss_scale: float
    """fp16's loss scale; 1 in other precisions."""
    skipped: bool
    """Was the update skipped for an overflow (fp16)?"""
    validation_loss: float | None = None
    """Mean validation loss, on steps that validate."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; one torn by a crash ends it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def keep_metrics_until(path: Path, step: int) -> None:
    """Forget lines after ``step``: the run goes on from there and writes them anew."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    aside = path.with_suffix(".jsonl.partial")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


class MetricsWriter:
    """Writes and shows the metrics of one run; a context manager.

    Args:
        run_dir: where ``metrics.jsonl``, ``tensorboard/`` and ``loss.png`` go.
        first_step: steps already done when this process began.
        unigram_entropy: of the training data, in nats a token, where it is known; for the plot.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, first_step: int, unigram_entropy: float | None
    ) -> None:
        self._unigram_entropy = unigram_entropy
        self._config = config
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        keep_metrics_until(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
            )
        self._console = Console()
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=config.training.train_steps, completed=first_step, note=""
        )

    def __enter__(self) -> MetricsWriter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if kind is None:
            from phi1_megatron.training.plot import plot_losses

            plot_losses(self._path, self._run_dir / "loss.png", self._unigram_entropy)

    def say(self, message: str) -> None:
        """A line on the terminal, above the progress bar."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def write(self, metrics: StepMetrics) -> None:
        """Record one step."""
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()
        self._to_tensorboard(metrics)
        self._show(metrics)

    def _to_tensorboard(self, metrics: StepMetrics) -> None:
        if self._tensorboard is None:
            return
        for name, value in asdict(metrics).items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"train/{name}", float(value), metrics.step)

    def _show(self, metrics: StepMetrics) -> None:
        note = f"loss {metrics.loss:.3f} · {metrics.tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=metrics.step, note=note)
        last = metrics.step == self._config.training.train_steps
        validated = metrics.validation_loss is not None
        if self._console.is_terminal:
            if validated:
                self.say(f"step {metrics.step:>6}  validation loss {metrics.validation_loss:.4f}")
            return
        if metrics.step % self._config.logging.log_interval == 0 or last or validated:
            line = f"step {metrics.step:>6}  loss {metrics.loss:.4f}"
            line += f"  lr {metrics.learning_rate:.2e}  {metrics.tokens_per_second:,.0f} tokens/s"
            if validated:
                line += f"  validation {metrics.validation_loss:.4f}"
            elif metrics.grad_norm is not None:
                line += f"  grad norm {metrics.grad_norm:.3f}"
            self.say(line)
