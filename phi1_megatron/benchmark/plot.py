"""The picture of a preprocessing benchmark: MB/s of every contender, on a logarithmic scale."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from phi1_megatron.benchmark.outcome import Outcome, Row

_OURS, _PEER = "#2a6f97", "#adb5bd"


def plot_speeds(outcome: Outcome, target: Path) -> None:
    """Draw the speeds as a PNG, one panel a tokenizer; does nothing where no row has a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    panels: dict[str, list[tuple[Row, float]]] = {}
    for row in outcome.rows:
        if row.megabytes_per_second is not None:
            panels.setdefault(row.tokenizer, []).append((row, row.megabytes_per_second))
    if not panels:
        return
    heights = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(8, 1.6 + 0.5 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=heights
    ).flat
    for axes, (tokenizer, rows) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, outcome, rows)
        axes.set_title(f"{tokenizer} tokenizer", loc="left", fontsize=10)
    speeds = [speed for rows in panels.values() for _, speed in rows]
    left = 10 ** math.floor(math.log10(min(speeds) * 0.9))
    axes.set_xlim(left, left * (max(speeds) / left) ** 1.7)  # the rest is for the figures
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("MB of text a second, start to exit (logarithmic)")
    figure.suptitle(
        f"JSONL to .bin and .idx: {outcome.input_megabytes:,.0f} MB, "
        f"{outcome.workers} workers, {outcome.machine['cpu']}",
        fontsize=11,
    )
    aside = target.with_suffix(".partial.png")
    figure.savefig(aside)
    os.replace(aside, target)


def _draw(axes: Any, outcome: Outcome, rows: list[tuple[Row, float]]) -> None:
    names = [outcome.label(row) for row, _ in rows]
    speeds = [speed for _, speed in rows]
    colours = [_OURS if row.is_ours else _PEER for row, _ in rows]
    axes.set_xscale("log")
    bars = axes.barh(names, speeds, color=colours, height=0.65)
    axes.bar_label(bars, [_beside(outcome, row, speed) for row, speed in rows], padding=4)
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _beside(outcome: Outcome, row: Row, speed: float) -> str:
    text = f"{speed:,.3g} MB/s"
    times = outcome.times_faster(row)
    if not row.is_ours and times is not None:
        text += f"; ours is {times:,.3g}x as fast"
    if row.difference:
        text += "; OTHER BYTES"
    return text
