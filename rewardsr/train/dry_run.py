"""A step of a recipe, taken to measure it."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from rewardsr import lora, run_folder
from rewardsr.train.checkpoint import State
from rewardsr.train.graphs import recorded_bytes, use_graphs
from rewardsr.train.loop import step
from rewardsr.train.memory import choose_micro_batch
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import Setup


@dataclass(frozen=True)
class DryRun:
    """What one step of a recipe costs.

    Attributes:
        seconds: of the step: the first one, slower than later ones; with CUDA graphs the third, which replays them.
        peak_gib: most memory that was in use: allocated on CUDA, and kept by its graphs; resident of the process
            elsewhere.
        trainable: number of trainable weights.
        would_save: files that a run would leave, with their sizes in bytes.
        metrics: of the step.
    """

    seconds: float
    peak_gib: float
    trainable: int
    would_save: dict[str, int]
    metrics: dict[str, Any]

    def __str__(self) -> str:
        cost = f"one step: {self.seconds:.2f} s, peak memory {self.peak_gib:.2f} GiB, {self.trainable} weights train"
        files = [f"would save {path} ({size / 2**20:.1f} MiB)" for path, size in self.would_save.items()]
        return "\n".join([cost, *files])


def measure_step(setup: Setup) -> DryRun:
    """Take one step and measure it; nothing is written."""
    optimiser, state, device = make_optimiser(setup), State(), setup.accelerator.device
    choose_micro_batch(setup, state)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if setup.recipe.cuda_graphs:
        use_graphs(setup.adapter, setup.method.trained_weights().values())
        for _ in range(2):  # as written, and recorded
            step(setup, optimiser, state)
    metrics, _ = step(setup, optimiser, state)
    on_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) + recorded_bytes(setup.adapter) if on_cuda else _peak_resident()
    trainable = sum(parameter.numel() for parameter in setup.method.trained_weights().values())
    run = setup.recipe.output
    sizes = {run_folder.LORA: 0, run_folder.FULL: 0}
    for group in setup.method.trained:
        for name, parameter in group.parameters.items() if group.lora == lora.NAME else ():
            sizes[run_folder.LORA if ".lora_" in name else run_folder.FULL] += 4 * parameter.numel()
    kept = [value for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value)]
    # What a run leaves, and the weights being trained.
    in_checkpoint = sum(sizes.values()) + 4 * trainable
    in_checkpoint += sum(value.nbytes for value in (*kept, *setup.method.state_dict().values()))
    would_save = {f"{run}/{file}": size for file, size in sizes.items() if size}
    would_save[f"{run}/{run_folder.CHECKPOINTS}/step-*/"] = in_checkpoint
    return DryRun(metrics["seconds"], peak / 2**30, trainable, would_save, metrics)


def _peak_resident() -> int:
    """Most memory in bytes that this process has had; what it has now where the system does not keep the peak."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
