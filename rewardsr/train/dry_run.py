"""A step of a recipe and a held-out image, to measure what the whole run will cost and whether it fits."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from rewardsr import lora, run_folder
from rewardsr.data.folder import Data
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.progress import clock, waiting
from rewardsr.train.checkpoint import State
from rewardsr.train.graphs import as_written, recorded_bytes, use_graphs
from rewardsr.train.loop import step
from rewardsr.train.memory import choose_micro_batch, memory_advice
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import Setup
from rewardsr.train.recipe import Recipe

CHEAP = 60.0  # seconds; what took longer at first is not measured again
DISK = 200e6  # bytes a second that a checkpoint is written with, about


@dataclass(frozen=True)
class ValidationCost:
    """What a validation costs, by one image and the pixels of all.

    Attributes:
        measured: name of the image, the largest.
        images: how many there are for each process.
        first: seconds of the first, which scores the base, too.
        later: seconds of each other.
    """

    measured: str
    images: int
    first: float
    later: float


@dataclass(frozen=True)
class Device:
    """Where the run takes place.

    Attributes:
        name: of the card, or the CPU with its threads.
        total_gib, free_gib: memory there is, and what of it this run may take: not in use by others.
    """

    name: str
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class DryRun:
    """What one step of a recipe costs, and by that the whole run.

    Attributes:
        first_seconds: of the first step, which is slower than later ones.
        seconds: of the second step; of the first where that took a minute; with CUDA graphs of the third, which
            replays them.
        peak_gib: most memory that was in use, in the steps and on the held-out image: allocated on CUDA, and kept by
            its graphs; resident of the process elsewhere.
        trainable: number of trainable weights.
        would_save: files that a run would leave, with their sizes in bytes.
        metrics: of the first step.
        device: what there is.
        validation: what one costs; None without held-out images.
        counts: steps, validations and checkpoints of the run.
    """

    first_seconds: float
    seconds: float
    peak_gib: float
    trainable: int
    would_save: dict[str, int]
    metrics: dict[str, Any]
    device: Device
    validation: ValidationCost | None
    counts: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.peak_gib <= self.device.free_gib

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the whole run, by what they are spent on."""
        parts = {"steps": self.counts["steps"] * self.seconds}
        if self.validation is not None:
            parts["validations"] = self.validation.first + (self.counts["validations"] - 1) * self.validation.later
        parts["checkpoints"] = self.counts["checkpoints"] * list(self.would_save.values())[-1] / DISK
        return parts

    def __str__(self) -> str:
        there = f"{self.device.name}, {self.device.total_gib:.1f} GiB, {self.device.free_gib:.1f} GiB of them free"
        spent = ", ".join(f"{self.counts[name]} {name} {clock(seconds)}" for name, seconds in self.parts.items())
        lines = [
            f"one step: {self.seconds:.2f} s (the first: {self.first_seconds:.2f} s), {self.trainable} weights train",
            f"the whole run: about {clock(sum(self.parts.values()))} ({spent})",
            f"peak memory {self.peak_gib:.2f} GiB on {there}: {'it fits' if self.fits else 'it does not fit'}",
        ]
        if (cost := self.validation) is not None:
            images = f"{cost.images} image{'s' * (cost.images != 1)}"
            lines.insert(
                1,
                f"one validation: {images} in about {clock(cost.later)}, the first with the base's scores "
                f"{clock(cost.first)} (by {cost.measured}, the largest)",
            )
        lines += [f"would save {path} ({size / 2**20:.1f} MiB)" for path, size in self.would_save.items()]
        return "\n".join(lines)


def measure_step(setup: Setup) -> DryRun:
    """Take a step or two and score a held-out image, and measure that; nothing is written."""
    optimiser, state, device = make_optimiser(setup), State(), setup.accelerator.device
    choose_micro_batch(setup, state)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    if setup.recipe.cuda_graphs:
        use_graphs(setup.adapter, setup.method.trained_weights().values())
    with waiting("measuring a step"):
        first, _ = step(setup, optimiser, state)
        last = first
        if setup.recipe.cuda_graphs:
            step(setup, optimiser, state)  # which records them
        if setup.recipe.cuda_graphs or first["seconds"] < CHEAP:
            last, _ = step(setup, optimiser, state)
    with waiting("measuring a validation"):
        validation = None if setup.validation is None else _measure_validation(setup, setup.validation)
    peak = torch.cuda.max_memory_allocated(device) + recorded_bytes(setup.adapter) if on_cuda else _peak_resident()
    return DryRun(
        first_seconds=first["seconds"],
        seconds=last["seconds"],
        peak_gib=peak / 2**30,
        trainable=sum(parameter.numel() for parameter in setup.method.trained_weights().values()),
        would_save=_would_save(setup, optimiser),
        metrics=first,
        device=_device(device),
        validation=validation,
        counts=_counts(setup.recipe),
    )


def _would_save(setup: Setup, optimiser: torch.optim.Optimizer) -> dict[str, int]:
    """Files of the run with their bytes, the checkpoint last."""
    run = setup.recipe.output
    sizes = {run_folder.LORA: 0, run_folder.FULL: 0}
    for group in setup.method.trained:
        for name, parameter in group.parameters.items() if group.lora == lora.NAME else ():
            sizes[run_folder.LORA if ".lora_" in name else run_folder.FULL] += 4 * parameter.numel()
    kept = [value for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value)]
    # What a run leaves, and the weights being trained.
    in_checkpoint = sum(sizes.values()) + sum(4 * weight.numel() for weight in setup.method.trained_weights().values())
    in_checkpoint += sum(value.nbytes for value in (*kept, *setup.method.state_dict().values()))
    would_save = {f"{run}/{file}": size for file, size in sizes.items() if size}
    return would_save | {f"{run}/{run_folder.CHECKPOINTS}/step-*/": in_checkpoint}


def _measure_validation(setup: Setup, data: Data) -> ValidationCost:
    """Score the largest held-out image twice: with the base, and as every later validation does."""
    chosen, side = setup.recipe.data, setup.recipe.data.validation_side
    items = data.items[: chosen.validation_limit]
    areas = [min(height, side or height) * min(width, side or width) for height, width in (i.size for i in items)]
    place = areas.index(max(areas))
    held_out = HeldOut(
        setup.adapter,
        lambda first, every: data.validation(chosen.validation_limit, setup.recipe.seed, side, place, len(items)),
        setup.metrics,
        seed=setup.recipe.seed,
        base=setup.method.reference,
        memory_advice=memory_advice(setup, "validation_side", "validation_limit"),
    )
    took = []
    with setup.method.shipped(), as_written(setup.adapter):
        for _ in range(2):
            began = time.perf_counter()
            names = held_out.score().images
            took.append(time.perf_counter() - began)
            if took[0] > CHEAP:  # the base's scores are about half of it
                took.append(took[0] / 2)
                break
    processes = setup.accelerator.num_processes
    share = sum(areas) / max(areas) / processes
    return ValidationCost(Path(names[0]).name, -(-len(items) // processes), took[0] * share, took[1] * share)


def _counts(recipe: Recipe) -> dict[str, int]:
    """How often a run does what; validations are saved before, and there is one before the first step."""
    looks = {*range(0, recipe.steps, recipe.validate_every), recipe.steps}
    saves = {*range(recipe.checkpoint_every, recipe.steps, recipe.checkpoint_every), *looks} - {0}
    return {"steps": recipe.steps, "validations": len(looks), "checkpoints": len(saves)}


def _device(device: torch.device) -> Device:
    """What there is, this process's own memory counted as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        return Device(torch.cuda.get_device_name(device), total / 2**30, free / 2**30)
    threads = torch.get_num_threads()
    name = f"{device.type.upper()} with {threads} thread{'s' * (threads != 1)}"
    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return Device(name, memory.total / 2**30, (memory.available + own) / 2**30)


def _peak_resident() -> int:
    """Most memory in bytes that this process has had; what it has now where the system does not keep the peak."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
