"""`rewardsr finetune` as a function."""

import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rewardsr.errors import UserError
from rewardsr.evaluation.page import read_page, write_page
from rewardsr.interrupts import keeping
from rewardsr.options import parse
from rewardsr.run_folder import REPORT
from rewardsr.storage import remove_leftovers
from rewardsr.train.dry_run import DryRun, measure_step
from rewardsr.train.loop import Result, train
from rewardsr.train.prepare import complete, set_up
from rewardsr.train.recipe import Recipe, load_recipe
from rewardsr.train.resume import check_output, held

logger = logging.getLogger(__name__)


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
            result = train(setup, run, resume, earlier)
        if setup.accelerator.is_main_process:
            _report(run)
        return result


def _report(run: Path) -> None:
    """Write the run's page; what keeps it from being written does not make the run fail."""
    try:
        logger.info("look at it: %s", write_page(run / REPORT, read_page([run])))
    except UserError as error:
        logger.warning("no report: %s", error)
