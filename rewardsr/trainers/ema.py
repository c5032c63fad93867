"""Exponential moving average of what is trained: a smoother copy of what training leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rewardsr.trainers.base import copy_into


def decay_at(update: int, decay: float) -> float:
    """Decay of update number `update` (from 0): min(decay, (1 + n) / (10 + n)).

    Without this warm-up an average with 0.999 is still nine tenths the start after a hundred updates.
    """
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def average(target: list[Tensor], source: list[Tensor], decay: float) -> None:
    """target = decay * target + (1 - decay) * source, in place; a few launches for all tensors together."""
    torch._foreach_lerp_(target, source, 1 - decay)


class EMA:
    """Moving average of parameters, in their precision.

    Args:
        parameters: by name.
        decay: of late updates; 0 follows the parameters at once.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._updates = 0
        self._average = {name: value.detach().clone() for name, value in parameters.items()}
        self._lists: tuple[list[Tensor], list[Tensor]] = list(self._average.values()), list(parameters.values())

    def update(self) -> None:
        """Take in the parameters after an optimiser's update."""
        average(*self._lists, decay_at(self._updates, self._decay))
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have the values of the average."""
        trained = {name: value.detach().clone() for name, value in self._parameters.items()}
        copy_into(self._parameters, self._average)
        try:
            yield
        finally:
            copy_into(self._parameters, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and how often it was updated."""
        return {
            "updates": torch.tensor(self._updates),
            **{f"average/{name}": value.cpu() for name, value in self._average.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError: it belongs to other parameters.
        """
        self._updates = int(state["updates"])
        copy_into(self._average, {name: state[f"average/{name}"] for name in self._average})
