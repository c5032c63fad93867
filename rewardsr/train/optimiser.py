"""The optimiser of a recipe, and its learning rate over time."""

import contextlib
import importlib
import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rewardsr.errors import UserError, one_line
from rewardsr.train.recipe import Recipe

if TYPE_CHECKING:  # which asks below whether the package is there
    from rewardsr.train.prepare import Setup

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
LEAST_RELATIVE = 1e-3  # Adafactor moves a tensor by a share of its root mean square, or of this where that is less


def check_optimiser(name: str) -> None:
    """Refuse an optimiser whose package is absent.

    Raises:
        UserError: it is.
    """
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise UserError(
            f"optimiser.name {name}: the package {PACKAGES[name]} is not installed; pip install 'rewardsr[optimisers]'"
        )


def make_optimiser(setup: "Setup") -> torch.optim.Optimizer:
    """The recipe's optimiser over what the method trains, in one launch for all tensors on CUDA where it can.

    Raises:
        UserError: its package does not work here, or it cannot train the method's groups at rates of their own.
    """
    options, cuda = setup.recipe.optimiser, setup.accelerator.device.type == "cuda"
    groups: list[dict[str, Any]] = [
        {"params": list(group.parameters.values()), "factor": group.learning_rate} for group in setup.method.trained
    ]
    common: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.name == "adafactor":
        return torch.optim.Adafactor(groups, eps=(options.eps, LEAST_RELATIVE), foreach=cuda, **common)
    common |= {"betas": options.betas, "eps": options.eps}
    if options.name == "adamw":
        return torch.optim.AdamW(groups, fused=cuda, **common)
    if options.name == "adamw8bit":
        made: torch.optim.Optimizer = _package(options.name).optim.AdamW8bit(groups, **common)
        return made
    rates = sorted({group["factor"] for group in groups} - {0})
    if len(rates) > 1:
        raise UserError(
            f"optimiser.name prodigy has one learning rate for everything, and trainer '{setup.recipe.trainer}' trains "
            f"at {', '.join(f'{rate:g}' for rate in rates)} times the recipe's: choose adamw"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        # What its authors advise for diffusion: warm-up must not lower its estimate, and first updates are not cut.
        made = _package(options.name).Prodigy(groups, safeguard_warmup=True, use_bias_correction=True, **common)
    return made


def learning_rate(recipe: Recipe, update: int) -> float:
    """Learning rate of update number `update` (from 0): linear warm-up, then constant or cosine to 0."""
    options, total = recipe.optimiser, recipe.steps * recipe.updates_per_group
    if update < options.warmup:
        return options.learning_rate * (update + 1) / options.warmup
    if options.schedule == "constant":
        return options.learning_rate
    progress = (update - options.warmup) / max(1, total - options.warmup)
    return options.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except Exception as error:  # bitsandbytes looks for libraries of CUDA's when it is imported
        raise UserError(f"optimiser.name {name}: {PACKAGES[name]} does not work here: {one_line(error)}") from error
