"""``phi1 train --dry-run``: what a recipe means, in numbers, before anything is started.

Only arithmetic and a look at which files exist: no torch, no megatron, nothing allocated.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi1_megatron.config.schema import BlendPart, RunConfig
from phi1_megatron.distributed.layout import Layout, model_parallel_size, plan_layout
from phi1_megatron.planning.flops import count_on_rank, count_parameters, flops_per_token

Rows = list[tuple[str, str]]
"""What a line is about, and its text; an empty label goes on with the one before."""


def describe_run(
    config: RunConfig,
    recipe: Path,
    run_dir: Path,
    num_processes: int | None,
    newest: Path | None = None,
) -> None:
    """Print what a run would be: model, layout, batches, schedule, operations, data and folder.

    Args:
        config: the recipe with its overrides.
        recipe: what to call it.
        run_dir: where the run would be kept.
        num_processes: its ranks; None for as many as one copy of the model takes.
        newest: the checkpoint it would go on from, if there is one.

    Raises:
        LayoutError: the layout does not divide; the message has the arithmetic.
    """
    layout = plan_layout(config, num_processes or model_parallel_size(config.parallel))
    rows = [
        ("recipe", str(recipe)),
        *_model_rows(config),
        *_layout_rows(config, layout, assumed=num_processes is None),
        *_batch_rows(config, layout),
        *_schedule_rows(config),
        *_operation_rows(config),
        *_data_rows(config),
        *_folder_rows(config, run_dir, newest),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label, style="bold"), Text(text))
    Console(highlight=False).print(table)


def _model_rows(config: RunConfig) -> Rows:
    model, count = config.model, count_parameters(config.model)
    parts = [
        ("embedding", count.embedding),
        ("attention", count.attention),
        ("MLP", count.mlp),
        ("LayerNorm", count.layernorm),
        ("output layer", count.output_layer),
    ]
    return [
        (
            "model",
            f"{model.num_layers} layers x {model.hidden_size:,} hidden x "
            f"{model.num_attention_heads} heads of {model.head_dim}, MLP {model.ffn_hidden_size:,}",
        ),
        ("", f"vocabulary {model.vocab_size:,}, padded to {model.padded_vocab_size:,} rows"),
        ("parameters", f"{count.total:,}"),
        *[("", f"{number:>15,}  {name}") for name, number in parts],
    ]


def _layout_rows(config: RunConfig, layout: Layout, assumed: bool) -> Rows:
    parallel = config.parallel
    rows: Rows = [("layout", layout.describe())]
    if assumed and config.training.device != "cpu":
        ranks = f"{layout.world_size} rank" + ("s" if layout.world_size > 1 else "")
        rows.append(("", f"for {ranks}; --num-processes says how many you will have"))
    layers = f"{config.model.num_layers // layout.pipeline} of {config.model.num_layers} layers"
    chunks = f", in {layout.virtual_pipeline} chunks" if layout.virtual_pipeline > 1 else ""
    held = [count_on_rank(config.model, parallel, stage) for stage in range(layout.pipeline)]
    fullest = held.index(max(held))
    where = f" (stage {fullest} of 0 to {layout.pipeline - 1})" if layout.pipeline > 1 else ""
    adam = "whole on each of them"
    if parallel.use_distributed_optimizer and layout.data > 1:
        adam = f"split over the {layout.data} data-parallel ranks"
    return [
        *rows,
        ("a stage", f"{layers}{chunks}"),
        ("a rank", f"at most {max(held):,} parameters{where}"),
        ("", f"AdamW's state is {adam}"),
        ("precision", f"{config.training.precision} on device {config.training.device}"),
    ]


def _batch_rows(config: RunConfig, layout: Layout) -> Rows:
    training = config.training
    step = training.global_batch_size * config.data.seq_length
    return [
        (
            "batch",
            f"{training.global_batch_size:,} samples = {training.micro_batch_size} micro x "
            f"{layout.data} data-parallel x {layout.num_microbatches} accumulated",
        ),
        (
            "tokens",
            f"{step:,} a step ({training.global_batch_size:,} x {config.data.seq_length:,})",
        ),
        ("", f"{_total_tokens(config):,} in {training.train_steps:,} steps"),
    ]


def _schedule_rows(config: RunConfig) -> Rows:
    scheduler, training, kept = config.scheduler, config.training, config.checkpoint
    decay_steps = scheduler.decay_steps or training.train_steps
    peak = config.optimizer.lr
    rate = f"{scheduler.init_lr:g} to {peak:g} over {scheduler.warmup_steps:,} steps"
    if scheduler.decay_style == "constant":
        rate += ", then constant"
    else:
        rate += f", {scheduler.decay_style} to {scheduler.min_lr:g} at step {decay_steps:,}"
    validation = "never"
    if training.eval_interval:
        validation = f"every {training.eval_interval:,} steps, {training.eval_steps} batches"
    saves = (
        f"every {kept.save_interval:,} steps and at the end" if kept.save_interval else "at the end"
    )
    return [
        ("rate", rate),
        ("validation", validation),
        ("checkpoints", f"{saves}; the newest {kept.keep_last} kept"),
    ]


def _operation_rows(config: RunConfig) -> Rows:
    model, length = config.model, config.data.seq_length
    each = flops_per_token(model, length)
    return [
        ("operations", f"{each:,} FLOPs a token = 6 N + 12 L h s"),
        (
            "",
            f"N {count_parameters(model).without_embedding:,} without the embedding, "
            f"L {model.num_layers}, h {model.hidden_size:,}, s {length:,}",
        ),
        ("", f"{each * _total_tokens(config):.3g} FLOPs in all"),
    ]


def _data_rows(config: RunConfig) -> Rows:
    total = _total_tokens(config)
    weights = sum(part.weight for part in config.data.blend)
    rows: Rows = []
    for part in config.data.blend:
        share = part.weight / weights
        rows.append(("", part.prefix))
        rows.append(("", f"    {share:6.1%}, {_short(share * total)} tokens; {_files(part)}"))
    for part in config.data.validation_blend or []:
        rows.append(("", part.prefix))
        rows.append(("", f"    validation; {_files(part)}"))
    if any(map(_missing, [*config.data.blend, *(config.data.validation_blend or [])])):
        rows.append(("", "phi1 preprocess makes what is not there"))
    return [("data", rows[0][1]), *rows[1:]]


def _missing(part: BlendPart) -> list[str]:
    """Which of a data set's two files are not there."""
    return [ending for ending in (".bin", ".idx") if not Path(part.prefix + ending).is_file()]


def _files(part: BlendPart) -> str:
    missing = _missing(part)
    return f"{' and '.join(missing)} not there" if missing else "there"


def _folder_rows(config: RunConfig, run_dir: Path, newest: Path | None) -> Rows:
    rows: Rows = [("run folder", str(run_dir))]
    if newest is not None:
        return [*rows, ("", f"goes on from {newest.name}")]
    rows.append(("", "starts at step 0: there is no whole checkpoint in it"))
    source = config.checkpoint.initialize_from
    if source:
        there = "" if Path(source).exists() else ", which is not there yet"
        rows.append(("", f"with the weights of {source}{there}"))
    return rows


def _total_tokens(config: RunConfig) -> int:
    training = config.training
    return training.train_steps * training.global_batch_size * config.data.seq_length


def _short(number: float) -> str:
    """A number of tokens to three figures: 43.7B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
