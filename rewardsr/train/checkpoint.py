"""Checkpoints: everything a run needs to go on bit for bit, in safetensors and JSON, written in one atomic step.

All randomness and the position in the data are functions of (seed, step), so neither needs saving beyond the step.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.run_folder import CHECKPOINTS as FOLDER
from rewardsr.storage import write_folder, write_text
from rewardsr.trainers.base import Method, Stateful, shipped
from rewardsr.weights import read_safetensors, write_safetensors

METHOD_FILE = "method.safetensors"


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
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    threads: int = 0
    processes: int = 0


def save(
    run: Path, adapter: ISRAdapter, method: Method, optimiser: torch.optim.Optimizer, state: State, keep: int
) -> Path:
    """Write `run/checkpoints/step-N` and drop all but the last `keep`; returns the folder.

    The LoRA there is the one to use; where it is not the one being trained, the method's own state has that.
    """
    path = run / FOLDER / f"step-{state.step:08d}"
    if path.exists():  # the last step of a run was due anyway
        return path

    def fill(folder: Path) -> None:
        with shipped(method):
            lora.save(adapter, folder)
        if isinstance(method, Stateful):
            write_safetensors(folder / METHOD_FILE, method.state_dict())
        write_safetensors(folder / "optimiser.safetensors", _moments(adapter, optimiser))
        write_text(folder / "state.json", json.dumps(asdict(state)))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    for old in _complete(run)[:-keep]:
        doomed = old.with_name(f".{old.name}.tmp")  # a half-removed checkpoint must not look like one
        old.replace(doomed)
        shutil.rmtree(doomed)
    return path


def resume(run: Path, adapter: ISRAdapter, method: Method, optimiser: torch.optim.Optimizer) -> State:
    """Put adapter, method and optimiser where the newest checkpoint left them; a fresh `State` where there is none.

    Raises:
        UserError: the checkpoint is damaged or belongs to another pipeline.
    """
    found = _complete(run)
    if not found:
        return State()
    newest = found[-1]
    try:
        state = State(**json.loads((newest / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint '{newest}' is damaged: {error}; remove it to resume from the one before"
        ) from error
    lora.load(adapter, newest)
    if isinstance(method, Stateful):
        try:
            method.load_state_dict(read_safetensors(newest / METHOD_FILE)[0])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"checkpoint '{newest}': its {METHOD_FILE} belongs to another LoRA or method") from error
        except ValueError as error:
            raise UserError(f"checkpoint '{newest}': {METHOD_FILE}: {error}") from error
    _set_moments(adapter, optimiser, read_safetensors(newest / "optimiser.safetensors")[0], newest)
    return state


def _complete(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first: only a finished one ever gets its name."""
    return sorted((run / FOLDER).glob("step-*"))


def _moments(adapter: ISRAdapter, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu()
        for name, parameter in lora.parameters(adapter).items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _set_moments(adapter: ISRAdapter, optimiser: torch.optim.Optimizer, saved: dict[str, Tensor], where: Path) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        parameter_name, _, key = name.rpartition("/")
        by_name.setdefault(parameter_name, {})[key] = value
    own = list(lora.parameters(adapter))
    if by_name and set(by_name) != set(own):
        raise UserError(f"checkpoint '{where}': its optimiser belongs to another LoRA")
    packed = optimiser.state_dict()
    packed["state"] = {index: by_name[name] for index, name in enumerate(own)} if by_name else {}
    optimiser.load_state_dict(packed)
