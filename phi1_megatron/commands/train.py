"""``phi1 train``: from a recipe to ranks at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def train(
    recipe: Path,
    /,
    *overrides: str,
    run_dir: Path | None = None,
    num_processes: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train from a recipe; run again on the same folder, it goes on where it stood.

    Under torchrun, Slurm or MPI each process takes the place they gave it. Under none of them this
    command starts the ranks of this machine itself.

    Parameters
    ----------
    recipe
        A TOML file; examples/recipes/ holds ready ones.
    overrides
        section.field=value, laid over the recipe; for example training.train_steps=100.
    run_dir
        Folder of the run; runs/RECIPE by default.
    num_processes
        Ranks to start here; by default every GPU, or on a CPU one copy of the model.
    dry_run
        Check everything, print layout and parameter counts, and start nothing.
    """
    from phi1_megatron.config.load import load_recipe
    from phi1_megatron.distributed.launch import find_place

    config = load_recipe(recipe, overrides)
    folder = run_dir or Path("runs") / recipe.stem
    place = find_place()
    if dry_run:
        from phi1_megatron.checkpoint.folder import check_resumable, list_checkpoints
        from phi1_megatron.planning.dry_run import describe_run

        ranks = num_processes or (place.world_size if place else None)
        checkpoints = list_checkpoints(folder)
        describe_run(config, recipe, folder, ranks, checkpoints[-1] if checkpoints else None)
        check_resumable(folder, config)
        return
    from phi1_megatron.training.launch import launch_training, train_on_this_rank

    if place is not None:
        train_on_this_rank(config, folder, place)
    else:
        launch_training(config, recipe, overrides, folder, num_processes)
