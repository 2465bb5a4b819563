"""Every recipe that we hand out: complete, as the facts say, and true to its own header."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from phi1_megatron.config.load import load_recipe
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.distributed.layout import model_parallel_size, plan_layout

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
PUBLISHED = [path for path in RECIPES if path.stem != "phi1_tiny_cpu"]
PARAMETERS = {
    "phi1": "1,418,270,720",
    "phi1_finetune": "1,418,270,720",
    "phi1_tp2_pp2": "1,418,270,720",
    "phi1_small": "356,794,368",
    "phi1_small_finetune": "356,794,368",
    "phi1_tiny_cpu": "1,844,992",
}
HEAVY = {"torch", "megatron", "transformers", "numpy"}


def header(path: Path) -> str:
    """The comment at a recipe's head, its continued lines joined."""
    head = path.read_text(encoding="utf-8").split("\n[", 1)[0]
    return re.sub(r" \\\n# +", " ", head)


def ranks_of(command: str) -> int:
    """Ranks that a line of a header starts: nodes x processes on each."""
    nodes = re.search(r"--(?:nnodes|nodes)=(\d+)", command)
    each = re.search(r"--(?:nproc-per-node|ntasks-per-node)=(\d+)", command)
    assert each, command
    return int(nodes[1] if nodes else 1) * int(each[1])


def start_lines(path: Path, launcher: str) -> list[str]:
    pattern = rf"^#   {launcher} .* {re.escape(f'examples/recipes/{path.name}')}$"
    return re.findall(pattern, header(path), flags=re.MULTILINE)


def ranks_named(path: Path) -> int:
    """Ranks of a recipe's machine, as its header says in words."""
    found = re.search(r"(\d+) ranks", header(path))
    assert found, path.name
    return int(found[1])


def test_all_the_recipes_are_here() -> None:
    assert {path.stem for path in RECIPES} == set(PARAMETERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_whole_and_its_layout_divides(path: Path) -> None:
    config = load_recipe(path)
    named = set(tomllib.loads(path.read_text(encoding="utf-8")))
    assert named == set(RunConfig.model_fields)  # a complete file: every section is in it
    least = model_parallel_size(config.parallel)
    assert plan_layout(config, least).data == 1


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_recipe_s_lines_start_the_ranks_that_its_header_names(path: Path) -> None:
    ranks = ranks_named(path)
    lines = start_lines(path, "torchrun") + start_lines(path, "srun")
    assert len(lines) >= 2
    assert {ranks_of(line) for line in lines} == {ranks}
    layout = plan_layout(load_recipe(path), ranks)
    assert layout.world_size == ranks
    text = path.read_text(encoding="utf-8")
    accumulated = re.search(r"x (\d+) (?:ranks|copies) x (\d+) accumulated", text)
    assert accumulated
    assert (layout.data, layout.num_microbatches) == tuple(map(int, accumulated.groups()))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_recipe_says_where_each_of_its_figures_is_from(path: Path) -> None:
    silent, whole_section = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        section = re.match(r"\[(\w+)\]\s*(#.*)?", line)
        if section:
            whole_section = "ours, all of it" in (section[2] or "")
        figure = re.match(r"(\w+) = (.*?)\s*(#.*)?$", line)
        if figure and re.search(r"\d", figure[2]) and not figure[3] and not whole_section:
            silent.append(figure[1])
    assert set(silent) <= {"pipeline_model_parallel_size"}


def test_phi_1_is_trained_as_published() -> None:
    config = load_recipe(FOLDER / "phi1.toml")
    training, optimizer, scheduler = config.training, config.optimizer, config.scheduler
    assert training.global_batch_size * config.data.seq_length == 2_097_152
    assert (training.train_steps, scheduler.decay_steps) == (36_000, 36_000)
    assert (optimizer.lr, scheduler.warmup_steps, scheduler.decay_style) == (1e-3, 750, "linear")
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-7)
    assert (training.precision, training.initial_loss_scale) == ("fp16", 2.0**12)
    model = config.model
    dropouts = (model.attention_dropout, model.hidden_dropout, model.embedding_dropout)
    assert dropouts == (0.1, 0.1, 0.0)
    assert model.padded_vocab_size == 51_200
    weights = [part.weight for part in config.data.blend]
    assert weights == pytest.approx([5.363, 2 * 0.742, 2 * 0.847, 2 * 0.358])


def test_phi_1_s_run_still_has_the_checkpoint_of_phi_1_base_at_its_end() -> None:
    config = load_recipe(FOLDER / "phi1.toml")
    kept = config.checkpoint
    steps = range(kept.save_interval, config.training.train_steps + 1, kept.save_interval)
    assert 24_000 in list(steps)[-kept.keep_last :]
    finetune = load_recipe(FOLDER / "phi1_finetune.toml")
    assert finetune.checkpoint.initialize_from == "runs/phi1/checkpoints/step_00024000"


def test_finetuning_is_as_published_and_keeps_every_save() -> None:
    config = load_recipe(FOLDER / "phi1_finetune.toml")
    training = config.training
    assert (training.global_batch_size, training.train_steps) == (256, 6000)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-4, 0.01)
    assert config.scheduler.warmup_steps == 50
    kept = config.checkpoint
    assert kept.save_interval == 1000
    assert kept.keep_last * kept.save_interval >= training.train_steps


@pytest.mark.parametrize(
    ("base", "other"),
    [("phi1", "phi1_finetune"), ("phi1_small", "phi1_small_finetune"), ("phi1", "phi1_tp2_pp2")],
)
def test_recipes_of_one_model_agree_on_it(base: str, other: str) -> None:
    first, second = (load_recipe(FOLDER / f"{name}.toml") for name in (base, other))
    assert first.model == second.model


def test_the_three_dimensional_layout_changes_nothing_but_the_layout() -> None:
    plain, spread = (load_recipe(FOLDER / f"{name}.toml") for name in ("phi1", "phi1_tp2_pp2"))
    assert plain.parallel != spread.parallel
    assert plain.model_dump(exclude={"parallel"}) == spread.model_dump(exclude={"parallel"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_of_the_real_command_counts_the_model_and_loads_nothing_heavy(
    path: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "phi1_megatron", "train", str(path)]
    done = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["parameters", PARAMETERS[path.stem]] for line in lines)
    assert max(map(len, lines)) <= 80
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "phi1_megatron.planning.dry_run" in loaded  # the listing is there at all
    assert {name for name in loaded if name.split(".")[0] in HEAVY} == set()
    assert list(tmp_path.iterdir()) == []  # and nothing was written
