"""What a run may go on with: its folder, which nobody else works on, its recipe, its images and machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rewardsr.errors import UserError
from rewardsr.run_folder import LOCK, RECIPE
from rewardsr.storage import is_leftover
from rewardsr.train import recipe as recipes
from rewardsr.train.checkpoint import State
from rewardsr.train.prepare import Setup, complete
from rewardsr.train.recipe import Recipe

logger = logging.getLogger(__name__)


def check_output(recipe: Recipe, resume: bool) -> Recipe | None:
    """Refuse a folder that holds something else than the run to be resumed; returns the recipe of the latter.

    Raises:
        UserError: it does; or the recipe of the run there is another one.
    """
    run = Path(recipe.output)
    if not run.exists() or all(entry.name == LOCK or is_leftover(entry) for entry in run.iterdir()):
        return None
    if not (run / RECIPE).is_file():
        raise UserError(f"output '{run}' is not empty and holds no run: choose another folder")
    if not resume:
        raise UserError(
            f"output '{run}' holds a run already: choose another folder, or continue that one with --resume"
        )
    other = complete(recipes.load_recipe(str(run / RECIPE), {}, []))
    different = recipes.differences(recipe, other)
    if different:
        raise UserError(
            f"the run in '{run}' has another recipe (differs in: {', '.join(different)}); resume it unchanged"
        )
    return other


def check_goes_on(state: State, setup: Setup) -> None:
    """Refuse to resume with other images or processes than the run began with; warn of another number of threads.

    Raises:
        UserError: they are others, or the run is past its last step already.
    """
    recipe, processes = setup.recipe, setup.accelerator.num_processes
    if state.step > recipe.steps:
        raise UserError(f"the run has taken {state.step} steps already, but steps is {recipe.steps}: raise it")
    if state.processes not in (0, processes):
        raise UserError(f"the run had {state.processes} processes, now there are {processes}: resume it with as many")
    state.processes = processes
    for what, data in (("train", setup.data), ("validation", setup.validation)):
        now, said = ("", "none") if data is None else (data.identity(), data.said)
        if state.data.setdefault(what, now) != now:
            raise UserError(
                f"the images, prompts or tensors of data.{what} ({said}) are not those that the run began with: bring "
                "them back, or begin a new run from its LoRA (lora.init)"
            )
    threads = torch.get_num_threads()
    if state.threads not in (0, threads):
        logger.warning("the run used %d CPU threads, now %d: it will differ in the last bits", state.threads, threads)
    state.threads = threads


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Inside, the folder of the run is ours: another run that wants it is refused. Of a launch the first process asks.

    The lock goes with the process, however that ends. A folder that did not become a run's is removed again.

    Raises:
        UserError: another process works on it, or it cannot be made.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"output '{run}' is a file")
    if (os.environ.get("RANK") or "0") != "0":
        yield
        return
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    lock = FileLock(run / LOCK, timeout=0)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"output '{run}': another process trains there now: wait for it, or choose another") from error
    except NotImplementedError:  # a file system without locks: go on, as all programs do there
        logger.warning("output '%s' lies where files cannot be locked: start no second run there", run)
    except OSError as error:
        raise UserError(f"cannot write to output '{run}': {error.strerror or error}") from error
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # it holds something
            for folder in made:
                folder.rmdir()
