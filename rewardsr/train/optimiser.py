"""The optimiser of a run, and its learning rate over time."""

import numpy as np
import torch

from rewardsr.train.prepare import Setup
from rewardsr.train.recipe import Recipe


def make_optimiser(setup: Setup) -> torch.optim.Optimizer:
    """AdamW over what the method trains, fused on CUDA."""
    options = setup.recipe.optimiser
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "factor": group.learning_rate} for group in setup.method.trained],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=setup.accelerator.device.type == "cuda",
    )


def learning_rate(recipe: Recipe, update: int) -> float:
    """Learning rate of update number `update` (from 0): linear warm-up, then constant or cosine to 0."""
    options, total = recipe.optimiser, recipe.steps * recipe.updates_per_group
    if update < options.warmup:
        return options.learning_rate * (update + 1) / options.warmup
    if options.schedule == "constant":
        return options.learning_rate
    progress = (update - options.warmup) / max(1, total - options.warmup)
    return options.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))
