"""How a run ends: what it ships, the cast test on request, and the record of it in the run's folder."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from rewardsr import lora
from rewardsr.ending import Ending, read_ending
from rewardsr.errors import TrainingError
from rewardsr.evaluation.offset import Offset, latent_offset
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import Evaluation
from rewardsr.run_folder import ENDING, FULL, LORA, VALIDATION
from rewardsr.storage import read_bytes, write_bytes, write_text
from rewardsr.together import everywhere
from rewardsr.train import checkpoint
from rewardsr.train.compiled import eager
from rewardsr.train.graphs import as_written
from rewardsr.train.guards import RULE, Guards
from rewardsr.train.prepare import Setup

T = TypeVar("T")

logger = logging.getLogger(__name__)

CAST_IMAGES = 16  # training images, in crops of the recipe's size, that the offset of the cast test is measured on


def end(setup: Setup, run: Path, step: int, guards: Guards, held_out: HeldOut | None) -> Ending:
    """End a run that has taken its last step, or that its guards stop; what has been done already is not done again.

    A run that ended without its cast test, and is asked for it now, makes up for that. Every process calls this. Where
    the guards stop the run, the adapter is left with the weights that are shipped.

    Args:
        setup: of the run.
        run: its folder.
        step: the last one.
        guards: with all verdicts.
        held_out: the run's; None where there are no held-out images.

    Raises:
        TrainingError: the guards stop the run, and no validation had all of them within their margins.
        UserError: a file cannot be read or written.
    """
    accelerator, stopped = setup.accelerator, guards.stopped
    best = guards.best if setup.recipe.keeps_best else None
    if stopped is not None:
        logger.warning("stopped by the guards after step %d of %d: %s", step, setup.recipe.steps, stopped)
        if best is None:
            raise TrainingError(
                "the guards leave nothing to ship, for no validation had all of them within their margins: validate "
                "more often, lower optimiser.learning_rate, or give the guard another margin"
            )
    ending = Ending(step, step, stopped, None, RULE)
    if best is not None:
        source = checkpoint.folder_of(run, best.step)
        ending = Ending(step, step if stopped is None else best.step, stopped, best.step, RULE)
        logger.info("best checkpoint, by the %s: step %d, kept in %s", RULE, best.step, source)
    test = setup.recipe.cast_test and held_out is not None
    ended, due = everywhere(accelerator, lambda: (read_ending(run), test and not _tested(run, ending.shipped)))[0]
    if ended == ending and not due:
        return ending
    if stopped is not None:
        lora.load(setup.adapter, source)
        _once(setup, partial(_ship, source, run))
    if due and held_out is not None:
        shipped = setup.method.shipped() if stopped is None else nullcontext()
        with shipped, eager(), as_written(setup.adapter):
            found = held_out.score(ending.shipped, _offset(setup))
        assert found.cast is not None
        for sentence in found.cast.sentences:
            logger.info("cast test: %s", sentence)
    _once(setup, lambda: write_text(run / ENDING, json.dumps(asdict(ending), indent=2) + "\n"))
    return ending


def _tested(run: Path, step: int) -> bool:
    """Whether the validation of a step has its cast test."""
    path = run / VALIDATION / f"step-{step:08d}.json"
    return path.is_file() and Evaluation.read(path).cast is not None


def _offset(setup: Setup) -> Offset:
    """The LoRA's mean change of the latents on training images; one process measures it for all."""
    recipe = setup.recipe
    images = setup.data.validation(CAST_IMAGES, recipe.seed, recipe.data.crop)
    count = min(CAST_IMAGES, len(setup.data.items))

    def measure() -> tuple[list[float], str]:
        found = latent_offset(setup.adapter, images, f"{count} training images", count=count, seed=recipe.seed)
        return found.numbers.tolist(), found.measured_on

    numbers, measured_on = _once(setup, measure)
    return Offset(torch.tensor(numbers, device=setup.adapter.device), measured_on)


def _once(setup: Setup, work: Callable[[], T]) -> T:
    """What the main process makes of some work that is its own; the others wait for it."""
    found = everywhere(setup.accelerator, lambda: [work()] if setup.accelerator.is_main_process else [])
    return found[0][0]


def _ship(source: Path, run: Path) -> None:
    """The weights of a checkpoint as those that the run leaves."""
    for path in (source / LORA, source / FULL):
        if path.is_file():
            write_bytes(run / path.name, read_bytes(path, f"'{path}'", path.stat().st_size))
