"""Exponential moving average of the LoRA: a smoother copy of what training leaves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter


def decay_at(update: int, decay: float) -> float:
    """Decay of update number `update` (from 0): min(decay, (1 + n) / (10 + n)).

    Without this warm-up an average with 0.999 is still nine tenths the start after a hundred updates.
    """
    return min(decay, (1 + update) / (10 + update))


@torch.no_grad()
def average(target: Mapping[str, Tensor], source: Mapping[str, Tensor], decay: float) -> None:
    """target = decay * target + (1 - decay) * source, in place."""
    for name, value in target.items():
        value.lerp_(source[name].to(value), 1 - decay)


class EMA:
    """Moving average of an adapter's LoRA, in float32.

    Args:
        adapter: with our LoRA attached.
        decay: of late updates; 0 follows the LoRA at once.
    """

    def __init__(self, adapter: ISRAdapter, decay: float) -> None:
        self._adapter, self._decay = adapter, decay
        self._updates = 0
        self._average = {name: value.detach().clone() for name, value in lora.parameters(adapter).items()}

    def update(self) -> None:
        """Take in the LoRA after an optimiser's update."""
        average(self._average, lora.parameters(self._adapter), decay_at(self._updates, self._decay))
        self._updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the adapter carries the average."""
        own = lora.parameters(self._adapter)
        trained = {name: value.detach().clone() for name, value in own.items()}
        _put(own, self._average)
        try:
            yield
        finally:
            _put(own, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, what is being trained, and how often the former was updated."""
        trained = lora.state_dict(self._adapter)
        return {
            "updates": torch.tensor(self._updates),
            **{f"average/{name}": value.cpu() for name, value in self._average.items()},
            **{f"trained/{name}": value for name, value in trained.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError: it belongs to another LoRA.
            ValueError: it holds values that are not finite.
        """
        bad = [name for name, value in state.items() if not value.isfinite().all()]
        if bad:
            raise ValueError(f"{bad[0]} holds values that are not finite")
        self._updates = int(state["updates"])
        _put(self._average, {name: state[f"average/{name}"] for name in self._average})
        own = lora.parameters(self._adapter)
        _put(own, {name: state[f"trained/{name}"] for name in own})


@torch.no_grad()
def _put(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        if source[name].shape != value.shape:  # `copy_` would broadcast
            raise KeyError(name)
        value.copy_(source[name])
