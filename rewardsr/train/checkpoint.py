"""Checkpoints: everything a run needs to go on bit for bit, in safetensors and JSON, written in one atomic step.

All randomness and the position in the data are functions of (seed, step), so neither needs saving beyond the step.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.errors import UserError
from rewardsr.run_folder import CHECKPOINTS, METHOD_STATE, MOMENTS, STATE, TRAINED, checkpoints
from rewardsr.storage import write_folder, write_text
from rewardsr.trainers.base import Method, copy_into
from rewardsr.weights import read_safetensors, write_safetensors

NUMBERS = "numbers"  # what an optimiser keeps beside its tensors, as JSON in the header of their file


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: steps finished, skipped ones included.
        updates: optimiser updates made or skipped; the learning rate is a function of it.
        skipped: updates that were not finite, in all.
        skipped_in_a_row: the last ones of these without a finite one between.
        threads: CPU threads that torch used; part of a run's identity on the CPU, where sums depend on it.
        processes: how many there were; the order of the data depends on it.
        micro_batch: rows of a pass that were found to fit; 0 where nobody has looked.
        data: identity of the images of training and validation (see `rewardsr.data.folder.Data.identity`).
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    threads: int = 0
    processes: int = 0
    micro_batch: int = 0
    data: dict[str, str] = field(default_factory=dict)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """The steps of which there are checkpoints, oldest first."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run)]


def save(
    run: Path, method: Method, optimiser: torch.optim.Optimizer, state: State, keep: int, best: int | None = None
) -> Path:
    """Write the checkpoint of this step and drop all but the last `keep` and that of step `best`; returns the folder.

    The LoRA there, and what was trained in full, are those to use; the weights being trained, which may be others, lie
    beside them.
    """
    path = folder_of(run, state.step)
    if path.exists():  # due for more than one reason
        return path

    def fill(folder: Path) -> None:
        with method.shipped():
            lora.save(method.adapter, folder)
        weights = {name: value.detach().cpu() for name, value in method.trained_weights().items()}
        write_safetensors(folder / TRAINED, weights)
        if own := method.state_dict():
            write_safetensors(folder / METHOD_STATE, own)
        write_safetensors(folder / MOMENTS, *_moments(method, optimiser))
        write_text(folder / STATE, json.dumps(asdict(state)))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    kept = None if best is None else folder_of(run, best)
    for old in checkpoints(run)[:-keep]:
        if old == kept:
            continue
        doomed = old.with_name(f".{old.name}.tmp")  # a half-removed checkpoint must not look like one
        old.replace(doomed)
        shutil.rmtree(doomed)
    return path


def resume(run: Path, method: Method, optimiser: torch.optim.Optimizer) -> State:
    """Put weights, method and optimiser where the newest checkpoint left them; a fresh `State` where there is none.

    Raises:
        UserError: the checkpoint is damaged, belongs to another pipeline or method, or is of rewardsr 0.1.0.
    """
    found = checkpoints(run)
    if not found:
        return State()
    newest = found[-1]
    if (newest / STATE).is_file() and not (newest / TRAINED).is_file():
        raise UserError(
            f"checkpoint '{newest}' is of rewardsr 0.1.0: finish that run with it, or begin a new one from the "
            f"LoRA there, lora.init={newest}"
        )
    try:
        state = State(**json.loads((newest / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint '{newest}' is damaged: {error}; remove it to resume from the one before"
        ) from error
    lora.load(method.adapter, newest)  # says it best if the checkpoint is another pipeline's
    _put(newest / TRAINED, lambda saved: copy_into(method.trained_weights(), saved))
    if method.state_dict():
        _put(newest / METHOD_STATE, method.load_state_dict)
    _set_moments(method, optimiser, *read_safetensors(newest / MOMENTS), newest)
    return state


def _put(file: Path, load: Callable[[dict[str, Tensor]], None]) -> None:
    saved = read_safetensors(file)[0]
    try:
        bad = [name for name, value in saved.items() if not value.isfinite().all()]
        if bad:
            raise ValueError(f"{bad[0]} holds values that are not finite")
        load(saved)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"checkpoint '{file.parent}': its {file.name} belongs to another LoRA or method") from error
    except ValueError as error:
        raise UserError(f"checkpoint '{file.parent}': {file.name}: {error}") from error


def _moments(method: Method, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An optimiser's tensors by weight, and in the header its numbers: by weight, and of each group."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, int | float] = {}
    for name, parameter in method.trained_weights().items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True)  # a table may be shared by all weights
            else:
                numbers[f"{name}/{key}"] = value
    groups = [
        {key: value for key, value in group.items() if type(value) in (int, float)} for group in optimiser.param_groups
    ]
    return tensors, {NUMBERS: json.dumps({"weights": numbers, "groups": groups})}


def _set_moments(
    method: Method, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], header: dict[str, str], where: Path
) -> None:
    numbers = json.loads(header.get(NUMBERS, "{}"))
    by_name: dict[str, dict[str, Any]] = {}
    for name, value in (tensors | numbers.get("weights", {})).items():
        parameter_name, _, key = name.rpartition("/")
        by_name.setdefault(parameter_name, {})[key] = value
    own = list(method.trained_weights())
    if not numbers or (by_name and set(by_name) != set(own)):
        raise UserError(f"checkpoint '{where}': its optimiser belongs to another LoRA or version")
    packed = optimiser.state_dict()
    packed["state"] = {index: by_name[name] for index, name in enumerate(own)} if by_name else {}
    packed["param_groups"] = [
        group | found for group, found in zip(packed["param_groups"], numbers["groups"], strict=True)
    ]
    optimiser.load_state_dict(packed)
