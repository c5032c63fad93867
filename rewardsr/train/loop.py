"""The training loop, the only one: whatever the method, it samples, back-propagates, steps, logs, saves.

It knows nothing of rewards; methods know nothing of files, devices and processes. accelerate is the engine. The
networks are not wrapped for several processes (calls through an adapter would bypass the wrapper); the LoRA's
gradients are averaged once a step instead, so every process takes the same step.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rewardsr import lora
from rewardsr.batch import Batch
from rewardsr.checks import Gathered, gathered
from rewardsr.draws import Draws, seed_of
from rewardsr.ending import Ending
from rewardsr.errors import TrainingError, UserError, is_out_of_memory
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.interrupts import Stop, StoppedError, finishing, keeping
from rewardsr.run_folder import ENDING, RECIPE, VERSIONS, checkpoints
from rewardsr.storage import write_text
from rewardsr.together import everywhere
from rewardsr.train import checkpoint
from rewardsr.train.checkpoint import State
from rewardsr.train.compiled import check_one_path, compile_networks, eager
from rewardsr.train.ending import end
from rewardsr.train.graphs import as_written, use_graphs
from rewardsr.train.guards import Guards
from rewardsr.train.log import RunLog
from rewardsr.train.memory import choose_micro_batch, lower_micro_batch, memory_advice
from rewardsr.train.optimiser import learning_rate, make_optimiser
from rewardsr.train.prepare import Setup
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.train.resume import check_goes_on
from rewardsr.train.trackers import Trackers
from rewardsr.train.update import Means, Samples, update
from rewardsr.trainers.base import Prepared
from rewardsr.versions import installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps taken.
        finished: False where a signal stopped it, or its last validation; resuming goes on from here.
        output: the run's folder.
        validation: scores on the held-out images, by metric: of the weights in `output`, or the last ones of a run that
            is not finished.
        stopped: why its guards ended the run; None: they did not.
        shipped: the step whose weights lie in `output`; None where it is not finished.
    """

    step: int
    finished: bool
    output: Path
    validation: dict[str, Any]
    stopped: str | None = None
    shipped: int | None = None

    def __str__(self) -> str:
        if not self.finished:
            return f"stopped after step {self.step}; go on with the same command and --resume"
        if self.stopped is not None:
            return (
                f"stopped by its guards after {self.step} steps, with the weights of step {self.shipped}, the best by "
                f"their rule: {self.output}"
            )
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
    _speed_up(setup)
    if accelerator.is_main_process:
        _write_origin(setup, run)
    for note in (*setup.notes, *_other_end(state, recipe, earlier)):
        logger.info(note)
    trackers = Trackers(run, recipe, state.step) if accelerator.is_main_process else None
    log = RunLog(run, recipe, state.step, accelerator.is_main_process, trackers)
    stop = Stop("stopping after this step; once more to quit")
    held_out = _held_out(setup, run, stop)
    # The main process alone has the log, and says for all of them what stands there.
    scored, kept = everywhere(accelerator, lambda: (log.validated, checkpoint.steps(run)))[0]
    guards = Guards(_steering(recipe), setup.margins, recipe.stop_when)
    guards.read(scored.values(), kept)
    save = _saver(setup, run, optimiser, state, guards)

    def validate() -> bool:
        """Validate if that is due; false where a signal left it off."""
        if held_out is None or (state.step % recipe.validate_every and state.step != recipe.steps):
            return True
        says = f"stopping after this image, {f'step {state.step} is saved' if state.step else 'before the first step'}"
        try:
            with setup.method.shipped(), eager(), as_written(setup.adapter), stop.saying(f"{says}; once more to quit"):
                found = held_out.score(state.step)
        except StoppedError:
            return False
        line = {"validation": guards.told(found.rewards)} | guards.judge(state.step, found.rewards)
        scored[state.step] = line
        log.write(state.step, line, held_out.rows)
        return True

    def finish() -> None:
        if state.step == recipe.steps and accelerator.is_main_process:
            with setup.method.shipped():
                lora.save(setup.adapter, run)

    ending = None
    with keeping(lambda: _kept(run)), log, finishing(stop):
        # A run that ended between its last checkpoint and what follows on that catches up.
        if guards.stopped is None:
            finish()
        whole, stopping = state.step in scored or validate(), False
        if state.step < recipe.steps and guards.stopped is None and accelerator.is_main_process:
            (run / ENDING).unlink(missing_ok=True)  # of a run that goes on after its end
        while state.step < recipe.steps and whole and not stopping and guards.stopped is None:
            metrics, stopping = _saved_if_it_fails(setup, state, save, lambda: step(setup, optimiser, state, stop))
            log.write(state.step, metrics)
            done, failing = state.step == recipe.steps, state.skipped_in_a_row >= recipe.max_skipped
            due = (recipe.checkpoint_every, recipe.validate_every)
            if done or stopping or failing or any(state.step % every == 0 for every in due):
                save()
            finish()
            if failing:
                raise _not_finite(state, metrics)
            if not stopping:
                whole = validate()
        if whole and not stopping:
            ending = end(setup, run, state.step, guards, held_out)
    accelerator.wait_for_everyone()
    return _result(run, state.step, whole and state.step == recipe.steps, scored, ending)


def _result(
    run: Path, at: int, finished: bool, scored: Mapping[int, Mapping[str, Any]], ending: Ending | None
) -> Result:
    last = scored.get(max(scored, default=0) if ending is None else ending.shipped, {}).get("validation", {})
    if ending is None:
        return Result(at, finished, run, last)
    return Result(at, True, run, last, ending.stopped, ending.shipped)


def _speed_up(setup: Setup) -> None:
    """Compile or record the networks, as the recipe asks."""
    if setup.recipe.compile:
        compile_networks(setup.adapter)
        check_one_path(setup)
    if setup.recipe.cuda_graphs:
        use_graphs(setup.adapter, setup.method.trained_weights().values())


def _not_finite(state: State, metrics: dict[str, Any]) -> TrainingError:
    return TrainingError(
        f"stopped at step {state.step}: {state.skipped_in_a_row} updates in a row were not finite "
        f"(first: {metrics['not_finite']}); lower optimiser.learning_rate, or look at that reward or tensor"
    )


def _steering(recipe: Recipe) -> dict[str, float]:
    """The weights of the rewards that steer."""
    return {entry.name: entry.weight for entry in recipe.rewards if entry.weight > 0}


def _write_origin(setup: Setup, run: Path) -> None:
    """What the run is made by: its recipe, the versions, and the device."""
    device = setup.accelerator.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write_text(run / RECIPE, to_yaml(setup.recipe))
    write_text(run / VERSIONS, json.dumps(installed() | {"device": named}, indent=2) + "\n")


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


def _held_out(setup: Setup, run: Path, stop: Stop) -> HeldOut | None:
    """The held-out images of a run, left off between two of them for a signal; None where the recipe names none."""
    recipe, data = setup.recipe, setup.validation
    if data is None:
        return None
    whole = partial(data.validation, recipe.data.validation_limit, recipe.seed, recipe.data.validation_side)

    def images(first: int, every: int) -> Iterator[Batch]:
        for batch in whole(first, every):
            stop.check()
            yield batch

    return HeldOut(
        setup.adapter,
        images,
        setup.metrics,
        count=len(data.items[: recipe.data.validation_limit]),
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


def _saver(
    setup: Setup, run: Path, optimiser: torch.optim.Optimizer, state: State, guards: Guards
) -> Callable[[], None]:
    def save() -> None:
        if setup.accelerator.is_main_process:
            best = guards.best if setup.recipe.keeps_best else None
            kept = None if best is None else best.step
            checkpoint.save(run, setup.method, optimiser, state, setup.recipe.keep_checkpoints, kept)
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


def _kept(run: Path) -> str:
    """What a run that quits leaves."""
    found = checkpoints(run)
    if not found:
        return "there is no checkpoint yet"
    return f"step {int(found[-1].name.removeprefix('step-'))} is kept; go on with the same command and --resume"
