"""The training loop, the only one: whatever the method, it samples, back-propagates, steps, logs, saves.

It knows nothing of rewards; methods know nothing of files, devices and processes. accelerate is the engine. The
networks are not wrapped for several processes (calls through an adapter would bypass the wrapper); the LoRA's
gradients are averaged once a step instead, so every process takes the same step.
"""

import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rewardsr import lora
from rewardsr.checks import Gathered, gathered
from rewardsr.draws import Draws, seed_of
from rewardsr.errors import TrainingError, UserError, is_out_of_memory
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.run_folder import RECIPE, VERSIONS
from rewardsr.storage import write_text
from rewardsr.together import any_process
from rewardsr.train import checkpoint
from rewardsr.train.checkpoint import State
from rewardsr.train.compiled import check_one_path, compile_networks, eager
from rewardsr.train.graphs import as_written, use_graphs
from rewardsr.train.log import RunLog
from rewardsr.train.memory import choose_micro_batch, lower_micro_batch, memory_advice
from rewardsr.train.optimiser import learning_rate, make_optimiser
from rewardsr.train.prepare import Setup
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.train.resume import check_goes_on
from rewardsr.train.update import Means, Samples, update
from rewardsr.trainers.base import Prepared
from rewardsr.versions import installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps finished.
        finished: False where a signal stopped it; resuming goes on from here.
        output: the run's folder.
        validation: last scores on the held-out images, by metric.
    """

    step: int
    finished: bool
    output: Path
    validation: dict[str, Any]

    def __str__(self) -> str:
        if not self.finished:
            return f"stopped after step {self.step}; go on with the same command and --resume"
        return f"finished {self.step} steps: {self.output}"


def train(setup: Setup, run: Path, resume: bool, earlier: Recipe | None = None) -> Result:
    """Run the recipe of `setup` into the folder `run`.

    The order of a step is: step, log, save, validate. So nothing that validation can do loses a trained step.

    Args:
        setup: everything loaded and checked.
        run: the run's folder.
        resume: go on from the newest checkpoint there, if there is one.
        earlier: the recipe that the run had until now.

    Raises:
        TrainingError: numbers stopped being finite, or the memory was not enough; checkpoints stay.
        UserError: a checkpoint does not fit, or the folder cannot be written to.
    """
    recipe, accelerator = setup.recipe, setup.accelerator
    optimiser = make_optimiser(setup)
    state = checkpoint.resume(run, setup.method, optimiser) if resume else State()
    check_goes_on(state, setup)
    choose_micro_batch(setup, state)
    if recipe.compile:
        compile_networks(setup.adapter)
        check_one_path(setup)
    if recipe.cuda_graphs:
        use_graphs(setup.adapter, setup.method.trained_weights().values())
    if accelerator.is_main_process:
        write_text(run / RECIPE, to_yaml(recipe))
        write_text(run / VERSIONS, json.dumps(installed() | {"device": _device(accelerator)}, indent=2) + "\n")
    for note in (*setup.notes, *_other_end(state, recipe, earlier)):
        logger.info(note)
    log = RunLog(run, recipe, state.step, accelerator.is_main_process)
    held_out = _held_out(setup, run)
    validation: dict[str, Any] = {}
    save = _saver(setup, run, optimiser, state)

    def validate() -> None:
        nonlocal validation
        if held_out is not None and (state.step % recipe.validate_every == 0 or state.step == recipe.steps):
            with setup.method.shipped(), eager(), as_written(setup.adapter):
                found = held_out.score(state.step)
            validation = {name: comparison.summary() for name, comparison in found.rewards.items()}
            log.write(state.step, {"validation": validation})

    def finish() -> None:
        if state.step == recipe.steps and accelerator.is_main_process:
            with setup.method.shipped():
                lora.save(setup.adapter, run)

    with log, _signals() as stopped:
        # A run that ended between its last checkpoint and what follows on that catches up.
        finish()
        if any_process(accelerator, accelerator.is_main_process and state.step not in log.validated):
            validate()
        stop = False
        while state.step < recipe.steps and not stop:
            metrics, stop = _saved_if_it_fails(setup, state, save, lambda: step(setup, optimiser, state, stopped))
            log.write(state.step, metrics)
            done, failing = state.step == recipe.steps, state.skipped_in_a_row >= recipe.max_skipped
            due = (recipe.checkpoint_every, recipe.validate_every)
            if done or stop or failing or any(state.step % every == 0 for every in due):
                save()
            finish()
            if failing:
                raise TrainingError(
                    f"stopped at step {state.step}: {state.skipped_in_a_row} updates in a row were not finite "
                    f"(first: {metrics['not_finite']}); lower optimiser.learning_rate, or look at that reward or tensor"
                )
            if not stop:
                validate()
    accelerator.wait_for_everyone()
    return Result(state.step, state.step == recipe.steps, run, validation)


def _device(accelerator: Accelerator) -> str:
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _saved_if_it_fails(
    setup: Setup, state: State, save: Callable[[], None], work: Callable[[], tuple[dict[str, Any], bool]]
) -> tuple[dict[str, Any], bool]:
    """A step; if a file became unreadable or a score is not finite, what was reached before is kept.

    Not so in the middle of several updates on a group, nor with several processes, which would wait for this one: the
    checkpoint before counts then.
    """
    try:
        return work()
    except (TrainingError, UserError):
        whole = state.updates == state.step * setup.recipe.updates_per_group
        if state.step and whole and setup.accelerator.num_processes == 1:
            save()
        raise


def step(
    setup: Setup, optimiser: torch.optim.Optimizer, state: State, stopped: Callable[[], bool] = lambda: False
) -> tuple[dict[str, Any], bool]:
    """One step: sample `accumulate` batches, then `updates_per_group` updates on them.

    Returns:
        What to log, and whether any process was asked to stop.
    """
    began = time.perf_counter()
    metrics = _with_less_at_once(setup, state, lambda: _step(setup, optimiser, state))
    state.step += 1
    averaged, stop = _agree(setup.accelerator, metrics, stopped())
    return averaged | {"skipped": state.skipped, "seconds": time.perf_counter() - began}, stop


def _with_less_at_once(setup: Setup, state: State, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step gives, tried again with fewer rows at once where memory is short and that may help."""
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler: the error holds on to what the step had in memory.
        if not lower_micro_batch(setup, state):
            raise TrainingError(memory_advice(setup))


def _step(setup: Setup, optimiser: torch.optim.Optimizer, state: State) -> dict[str, Any]:
    _seed_everything(setup.recipe.seed, state.step, setup.accelerator.process_index)
    metrics: dict[str, Any] = {}
    with gathered() as checks:
        samples = _sample(setup, state.step, checks)
        for number in range(setup.recipe.updates_per_group):
            metrics = update(setup, optimiser, state, samples, number)
    return metrics


def _sample(setup: Setup, at: int, checks: Gathered) -> Samples:
    """The prepared batches of a step."""
    samples = Samples([], Means(), checks)
    try:
        for group, indices in _groups(setup, at):
            samples.groups.append((group, indices))
            samples.means.add(group.metrics, len(indices))
    except Exception as error:
        samples.failure = error
    return samples


def _held_out(setup: Setup, run: Path) -> HeldOut | None:
    """The held-out images of a run; None where the recipe names none."""
    recipe, data = setup.recipe, setup.validation
    if data is None:
        return None
    return HeldOut(
        setup.adapter,
        partial(data.validation, recipe.data.validation_limit, recipe.seed, recipe.data.validation_side),
        setup.metrics,
        seed=recipe.seed,
        base=setup.method.reference,
        accelerator=setup.accelerator,
        run=run,
        memory_advice=memory_advice(setup, "validation_side", "validation_limit"),
    )


def _groups(setup: Setup, at: int) -> Iterator[tuple[Prepared, list[int]]]:
    """The prepared batches of a step, each with the indices of its samples in the whole batch over all processes."""
    recipe, accelerator = setup.recipe, setup.accelerator
    per_pass = recipe.batch_size * accelerator.num_processes

    def stream(turn: int) -> list[int]:
        """Where this process's samples of a turn stand in the endless stream; turns go on into later steps."""
        first = (at * recipe.accumulate + turn) * per_pass + accelerator.process_index * recipe.batch_size
        return list(range(first, first + recipe.batch_size))

    whole = per_pass * recipe.accumulate
    for turn in range(recipe.accumulate):
        batch = setup.data.batch(recipe.seed, stream(turn))
        setup.data.prefetch(recipe.seed, map(stream, count(turn + 1)))
        indices = [index - at * whole for index in stream(turn)]
        draws = Draws(recipe.seed, at, indices, "group")
        yield setup.method.prepare(batch.to(accelerator.device), draws), indices


def _agree(accelerator: Accelerator, metrics: dict[str, Any], stop: bool) -> tuple[dict[str, Any], bool]:
    """Metrics averaged by name over the processes that have them, and whether any of these was asked to stop."""
    if accelerator.num_processes == 1:
        return metrics, stop
    means, words = Means(), dict[str, Any]()
    everyone = gather_object([(metrics, stop)])
    for theirs, _ in everyone:
        means.add({name: value for name, value in theirs.items() if isinstance(value, float)})
        words |= {name: value for name, value in theirs.items() if not isinstance(value, float)}
    return words | means.result(), any(stops for _, stops in everyone)


def _saver(setup: Setup, run: Path, optimiser: torch.optim.Optimizer, state: State) -> Callable[[], None]:
    def save() -> None:
        if setup.accelerator.is_main_process:
            checkpoint.save(run, setup.method, optimiser, state, setup.recipe.keep_checkpoints)
        setup.accelerator.wait_for_everyone()

    return save


def _seed_everything(seed: int, at: int, process: int) -> None:
    """Seed the global generators from the step: what third-party rewards draw is then equal after a resume, too."""
    mixed = seed_of(seed, at, "global", process)
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def _other_end(state: State, recipe: Recipe, earlier: Recipe | None) -> Iterator[str]:
    """A note where a resumed run has another number of steps than before."""
    if earlier is None or earlier.steps == recipe.steps:
        return
    note = f"the run ends at step {recipe.steps}, not {earlier.steps}"
    if recipe.optimiser.schedule == "cosine":
        before, now = (learning_rate(one, state.updates) for one in (earlier, recipe))
        note += f"; its cosine does, too: the learning rate goes on at {now:.3g} instead of {before:.3g}"
    yield note


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM only leave word, so that the step is finished and saved; a second one ends it."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    # Handlers can be set in the main thread only; elsewhere (a notebook's worker) signals stay as they are.
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
