"""Draw which rank holds what: ``python tools/docs/draw_layout.py RECIPE RANKS OUTPUT.png``.

The picture is made from the same arithmetic that places a run (phi1_megatron.distributed.layout);
overrides may follow, as for ``phi1 train``. The README's pictures:

python tools/docs/draw_layout.py examples/recipes/phi1_tp2_pp2.toml 8 \
    docs/images/layout_tp2_sp_pp2_dp2.png parallel.virtual_pipeline_model_parallel_size=none
python tools/docs/draw_layout.py examples/recipes/phi1_tp2_pp2.toml 8 \
    docs/images/layout_tp2_sp_pp2_vpp2_dp2.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from phi1_megatron.config.load import load_recipe
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.layout import Coordinate, Layout, plan_layout
from phi1_megatron.errors import LayoutError

INK, SOFT, LINE = "#1f2933", "#52606d", "#cbd2d9"
STAGE_COLOURS = ("#2a6f97", "#b5651d", "#3a7d44", "#7b4b94")
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 4.3, 1.42, 1.25, 1.0
TEXT_SIZE = 9.5


@dataclass(frozen=True)
class Share:
    """What one rank holds, in words."""

    rank: int
    title: str
    lines: tuple[str, ...]


def share_of(rank: int, config: RunConfig, layout: Layout) -> Share:
    """The share of a rank: its layers, its part of each matrix, its part of each sequence."""
    place, model = layout.coordinate(rank), config.model
    ends = []
    if place.pipeline == 0:
        ends.append("embedding")
    if place.pipeline == layout.pipeline - 1:
        ends.append("output layer")
    rows = _part(model.padded_vocab_size, layout.tensor, place.tensor)
    lines = [
        f"layers {_layers(place.pipeline, model.num_layers, layout)}",
        f"heads {_part(model.num_attention_heads, layout.tensor, place.tensor)}, "
        f"MLP rows {_part(model.ffn_hidden_size, layout.tensor, place.tensor)}",
    ]
    if ends:
        lines.append(f"{' and '.join(ends)}: ids {rows}")
    if layout.sequence_parallel:
        tokens = _part(config.data.seq_length, layout.tensor, place.tensor)
        lines.append(f"LayerNorm, dropout: tokens {tokens}")
    return Share(rank, f"rank {rank}", tuple(lines))


def _layers(stage: int, num_layers: int, layout: Layout) -> str:
    """The layers of a stage, counted from 0; one range for each of its model chunks."""
    size = num_layers // (layout.pipeline * layout.virtual_pipeline)
    starts = [(chunk * layout.pipeline + stage) * size for chunk in range(layout.virtual_pipeline)]
    return " and ".join(f"{start} to {start + size - 1}" for start in starts)


def _part(whole: int, parts: int, number: int) -> str:
    size = whole // parts
    return f"{number * size:,} to {(number + 1) * size - 1:,}"


def draw(config: RunConfig, layout: Layout) -> Figure:
    """Stages from left to right, copies of the model from top to bottom."""
    if layout.context > 1:
        raise LayoutError("context parallelism is not drawn here; leave context_parallel_size at 1")
    copy_height = layout.tensor * BOX_HEIGHT + 0.62
    width = layout.pipeline * (BOX_WIDTH + GAP_X) - GAP_X
    height = layout.data * (copy_height + GAP_Y) - GAP_Y
    figure = Figure(figsize=(width + 0.9, height + 1.75), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-0.45, width + 0.45)
    axes.set_ylim(-0.7, height + 1.05)
    axes.axis("off")
    axes.text(0, height + 0.72, layout.describe(), size=14, weight="bold", color=INK, va="center")
    model = config.model
    axes.text(
        0,
        height + 0.34,
        f"{model.num_layers} layers x {model.hidden_size:,} hidden, "
        f"{model.num_attention_heads} heads, MLP {model.ffn_hidden_size:,}, "
        f"vocabulary {model.padded_vocab_size:,}; everything counted from 0",
        size=TEXT_SIZE,
        color=SOFT,
        va="center",
    )
    for data in range(layout.data):
        top = height - data * (copy_height + GAP_Y)
        for stage in range(layout.pipeline):
            left = stage * (BOX_WIDTH + GAP_X)
            _draw_stage(axes, config, layout, data, stage, left, top, copy_height)
            if stage:
                _draw_stage_arrow(axes, left, top - copy_height / 2, layout.virtual_pipeline > 1)
        if data:
            note = "gradients reduced"
            if config.parallel.use_distributed_optimizer:
                note += ", weights gathered"
            _draw_copies_arrow(axes, layout, top, f"{note},\nonce a step")
    if layout.tensor > 1:
        note = "a dashed box: ranks that gather and reduce activations inside every layer"
        axes.text(0, -0.4, note, size=TEXT_SIZE, color=SOFT, va="center")
    return figure


def _draw_stage(
    axes: Any,
    config: RunConfig,
    layout: Layout,
    data: int,
    stage: int,
    left: float,
    top: float,
    height: float,
) -> None:
    colour = STAGE_COLOURS[stage % len(STAGE_COLOURS)]
    axes.add_patch(
        FancyBboxPatch(
            (left, top - height),
            BOX_WIDTH,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            fc="none",
            ec=colour,
            lw=1.2,
            ls=(0, (4, 3)),
        )
    )
    axes.text(
        left + 0.16,
        top - 0.25,
        f"copy {data}, stage {stage}",
        size=TEXT_SIZE,
        weight="bold",
        color=colour,
        va="center",
    )
    for tensor in range(layout.tensor):
        place = Coordinate(tensor=tensor, context=0, data=data, pipeline=stage)
        share = share_of(layout.rank(place), config, layout)
        bottom = top - 0.48 - (tensor + 1) * BOX_HEIGHT + 0.08
        _draw_rank(axes, share, colour, left + 0.12, bottom)


def _draw_rank(axes: Any, share: Share, colour: str, left: float, bottom: float) -> None:
    width, height = BOX_WIDTH - 0.24, BOX_HEIGHT - 0.12
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            fc=colour + "14",
            ec=colour,
            lw=0.9,
        )
    )
    axes.text(
        left + 0.14,
        bottom + height - 0.2,
        share.title,
        size=TEXT_SIZE + 0.5,
        weight="bold",
        color=INK,
        va="center",
    )
    for number, line in enumerate(share.lines):
        axes.text(
            left + 0.14,
            bottom + height - 0.44 - 0.23 * number,
            line,
            size=TEXT_SIZE - 0.7,
            color=INK,
            va="center",
        )


def _draw_stage_arrow(axes: Any, right: float, middle: float, interleaved: bool) -> None:
    start, end = right - GAP_X + 0.1, right - 0.1
    for offset, (a, b), label in (
        (0.13, (start, end), "activations"),
        (-0.13, (end, start), "gradients"),
    ):
        axes.add_patch(
            FancyArrowPatch(
                (a, middle + offset),
                (b, middle + offset),
                arrowstyle="<|-|>" if interleaved else "-|>",
                mutation_scale=11,
                color=SOFT,
                lw=1.1,
                shrinkA=0,
                shrinkB=0,
            )
        )
        axes.text(
            (start + end) / 2,
            middle + offset * 2.2,
            label,
            size=TEXT_SIZE - 1.2,
            color=SOFT,
            ha="center",
            va="center",
        )


def _draw_copies_arrow(axes: Any, layout: Layout, top: float, note: str) -> None:
    for stage in range(layout.pipeline):
        middle = stage * (BOX_WIDTH + GAP_X) + BOX_WIDTH * 0.2
        axes.add_patch(
            FancyArrowPatch(
                (middle, top + 0.06),
                (middle, top + GAP_Y - 0.06),
                arrowstyle="<|-|>",
                mutation_scale=11,
                color=SOFT,
                lw=1.1,
                shrinkA=0,
                shrinkB=0,
            )
        )
        axes.text(
            middle + 0.16,
            top + GAP_Y / 2,
            note,
            size=TEXT_SIZE - 1.2,
            color=SOFT,
            va="center",
        )


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("ranks", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    arguments = parser.parse_args()
    config = load_recipe(arguments.recipe, arguments.overrides)
    figure = draw(config, plan_layout(config, arguments.ranks))
    # Without metadata the same drawing is the same bytes.
    figure.savefig(arguments.output, metadata={"Software": None})


if __name__ == "__main__":
    main()
