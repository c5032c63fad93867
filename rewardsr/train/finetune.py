"""`rewardsr finetune` as a function."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rewardsr.interrupts import keeping
from rewardsr.options import parse
from rewardsr.storage import remove_leftovers
from rewardsr.train.dry_run import DryRun, measure_step
from rewardsr.train.loop import Result, train
from rewardsr.train.prepare import complete, set_up
from rewardsr.train.recipe import Recipe, load_recipe
from rewardsr.train.resume import check_output, held


def finetune(
    recipe: Recipe | Mapping[str, Any] | str | Path, *, resume: bool = False, dry_run: bool = False
) -> Result | DryRun:
    """Fine-tune a pipeline.

    Args:
        recipe: a Recipe, a mapping of the same keys, or the path of a YAML file.
        resume: go on with the run in the recipe's output folder, if there is one.
        dry_run: take two steps and score a held-out image to measure them, and write nothing.

    Raises:
        UserError: anything wrong with the recipe or what it names, before long work begins.
        TrainingError: training cannot go on; checkpoints stay.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(str(recipe), {}, [])
    elif not isinstance(recipe, Recipe):
        recipe = parse(Recipe, dict(recipe), "recipe")
    recipe = complete(recipe)
    if dry_run:
        setup = set_up(recipe, decode=False)
        with closing(setup.data):
            return measure_step(setup)
    run = Path(recipe.output)
    with held(run):
        with keeping("nothing was written"):
            earlier = check_output(recipe, resume)
            setup = set_up(recipe)
        setup.accelerator.wait_for_everyone()  # until every process has looked into the folder, nothing may be written
        if setup.accelerator.is_main_process:
            remove_leftovers(run)
        with closing(setup.data):
            return train(setup, run, resume, earlier)
