"""One update of the weights: gradients of the losses, averaged over the processes, clipped, and one optimiser step.

What the device found is read once, when everything has been launched: each look at a value before would have waited
for all that was launched until then. Nothing that is not finite reaches a weight for that: the device itself holds the
optimiser back, or the read comes first where the optimiser cannot be held back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from rewardsr.checks import Gathered, read
from rewardsr.draws import Draws
from rewardsr.together import raise_everywhere
from rewardsr.train.checkpoint import State
from rewardsr.train.optimiser import learning_rate
from rewardsr.train.prepare import Setup
from rewardsr.trainers.base import ParameterGroup, Prepared, Scalar


class Means:
    """Weighted means by name, each over those that have it; scalars on a device stay there until they are read."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Scalar, float]] = []

    def add(self, metrics: Mapping[str, Scalar], weight: float = 1.0) -> None:
        """Take in some numbers."""
        self._entries += [(name, value, weight) for name, value in metrics.items()]

    @property
    def scalars(self) -> list[Scalar]:
        """All numbers that were taken in, in order."""
        return [value for _, value, _ in self._entries]

    def result(self, values: Sequence[float] | None = None) -> dict[str, float]:
        """The mean of each.

        Args:
            values: of `scalars`, where they have been read already.
        """
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for (name, _, weight), value in zip(
            self._entries, read(self.scalars) if values is None else values, strict=True
        ):
            sums[name] = sums.get(name, 0.0) + value * weight
            weights[name] = weights.get(name, 0.0) + weight
        return {name: total / weights[name] for name, total in sums.items()}

    def not_finite(self, values: Sequence[float]) -> str:
        """Name of the first of these values of `scalars` that is not finite; empty if all are."""
        return next(
            (name for (name, *_), value in zip(self._entries, values, strict=True) if not np.isfinite(value)), ""
        )


@dataclass
class Samples:
    """What a step has sampled, or the failure that kept it from doing so.

    Attributes:
        groups: prepared batches, each with the indices of its samples in the whole batch over all processes.
        means: of their metrics.
        checks: noted down while they were prepared.
        failure: of this process; the others hear of it at the next update.
    """

    groups: list[tuple[Prepared, list[int]]]
    means: Means
    checks: Gathered
    failure: Exception | None = None


def update(
    setup: Setup, optimiser: torch.optim.Optimizer, state: State, samples: Samples, number: int
) -> dict[str, Any]:
    """Back-propagate the losses of the groups and take one optimiser step, unless something is not finite.

    Args:
        setup: of the run.
        optimiser: of what the method trains.
        state: where the run is; its counts of updates go on.
        samples: of the step.
        number: of the update in its step.

    Raises:
        Exception: of this process or another, in all of them. Nothing has been changed then.
    """
    parameters = setup.method.trained_weights()
    optimiser.zero_grad(set_to_none=True)
    means, failure = Means(), samples.failure
    if failure is None:
        try:
            _back_propagate(setup, state, samples, number, means)
        except Exception as error:
            failure = error
    if failure is not None and setup.accelerator.num_processes == 1:
        raise failure
    gradients = [torch.zeros_like(p) if failure is not None or p.grad is None else p.grad for p in parameters.values()]
    scalars, flags, device = means.scalars, samples.checks.flags, gradients[0].device
    failed = torch.full((), float(failure is not None), device=device)
    if failure is None:
        # An infinite loss can have a finite gradient: let every process see that this update is void.
        gradients[0].masked_fill_(~_all_finite(scalars, device), torch.nan)
        if samples.checks.fatal:
            failed = (1 - torch.stack(samples.checks.fatal)).sum()
    failed = _average(setup.accelerator, gradients, failed)
    if failure is not None:
        raise_everywhere(failure)
    norms = _clip(setup.method.trained, setup.recipe.optimiser.clip)
    rate = learning_rate(setup.recipe, state.updates)
    for parameter_group in optimiser.param_groups:
        parameter_group["lr"] = rate * parameter_group["factor"]
    skip = (failed > 0) | ~torch.stack(list(norms.values())).isfinite().all()
    launched = _launched(optimiser, skip)
    read_together = ([failed], list(norms.values()), flags, scalars, samples.means.scalars)
    found = iter(read([scalar for part in read_together for scalar in part]))
    others, told, held, values, sampled = ([next(found) for _ in part] for part in read_together)
    unmet = samples.checks.judge(held)
    if others[0] > 0:
        raise_everywhere(unmet)
    metrics: dict[str, Any] = means.result(values) | samples.means.result(sampled)
    metrics |= dict(zip(norms, told, strict=True)) | {"learning_rate": rate}
    state.updates += 1
    if np.isfinite(told).all():
        if not launched:
            optimiser.step()
        setup.method.after_update()
        state.skipped_in_a_row = 0
    else:
        metrics["not_finite"] = means.not_finite(values) or _not_finite(parameters)
        state.skipped += 1
        state.skipped_in_a_row += 1
    return metrics


def _back_propagate(setup: Setup, state: State, samples: Samples, number: int, means: Means) -> None:
    recipe = setup.recipe
    for group, indices in samples.groups:
        draws = Draws(recipe.seed, state.step, indices, f"update-{number}")
        for loss in setup.method.losses(group, draws):
            assert torch.is_grad_enabled(), "a method yielded inside no_grad"
            (loss.value / recipe.accumulate).backward()
            means.add(loss.metrics, loss.weight)
    without = [name for name, parameter in setup.method.trained_weights().items() if parameter.grad is None]
    assert not without, f"{without[0]} got no gradient: was the LoRA switched off?"


def _all_finite(scalars: Iterable[Scalar], device: torch.device) -> Tensor:
    """Whether all are; scalar bool on the device."""
    away = [scalar.detach().float() for scalar in scalars if isinstance(scalar, Tensor) and scalar.device == device]
    here = [float(scalar) for scalar in scalars if not (isinstance(scalar, Tensor) and scalar.device == device)]
    finite = torch.full((), bool(np.isfinite(here).all()), device=device)
    return finite & torch.stack(away).isfinite().all() if away else finite


def _average(accelerator: Accelerator, gradients: list[Tensor], failed: Tensor) -> Tensor:
    """Average gradients over the processes, in one call, and with them `failed`, a scalar: more than 0 if one has."""
    if accelerator.num_processes == 1:
        return failed
    flat = accelerator.reduce(torch.cat([failed[None], *(gradient.flatten() for gradient in gradients)]), "mean")
    for gradient, part in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[0]


def _clip(groups: Sequence[ParameterGroup], default: float) -> dict[str, Tensor]:
    """Clip the gradients of each group; their norms before, "grad_norm" of the first group."""
    norms = {}
    for place, group in enumerate(groups):
        clip = default if group.clip is None else group.clip
        norm = torch.nn.utils.clip_grad_norm_(group.parameters.values(), clip)
        norms[f"grad_norm/{group.name}" if place else "grad_norm"] = norm
    return norms


def _launched(optimiser: torch.optim.Optimizer, skip: Tensor) -> bool:
    """Launch the optimiser's step, where it does nothing on the device if `skip` is set; false where it cannot."""
    if not getattr(optimiser, "_step_supports_amp_scaling", False):
        return False
    # As torch's own GradScaler tells fused optimisers to hold still.
    optimiser.grad_scale, optimiser.found_inf = None, skip.float()  # type: ignore[attr-defined]
    try:
        optimiser.step()
    finally:
        del optimiser.grad_scale, optimiser.found_inf  # type: ignore[attr-defined]
    return True


def _not_finite(parameters: Mapping[str, Tensor]) -> str:
    """The first gradient that is not finite, in words."""
    bad = (name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all())
    tensor = next(bad, "").partition("/")[2]
    return f"gradient of {tensor}" if tensor else "norm of the gradient"
