"""What a training method is: `prepare` looks, `losses` learns. The loop that runs it is in `rewardsr.training`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel
from torch import Tensor

from rewardsr.adapter import Batch, ISRAdapter
from rewardsr.draws import Source
from rewardsr.rewards.base import Reward


@dataclass(frozen=True)
class Loss:
    """Something to back-propagate.

    Attributes:
        value: scalar whose gradient is the method's; the loop back-propagates it at once and frees its graph.
            The gradients of all losses of a group add up to that of the method's loss.
        metrics: what to log; the loop averages over a step's losses, weighted by `weight`.
        weight: share of the group's images behind this loss.
    """

    value: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0


class Prepared(Protocol):
    """What `prepare` returns; the loop reads its metrics and hands it to `losses`."""

    @property
    def metrics(self) -> dict[str, float]:
        """What to log of the preparation."""
        ...


class Method(Protocol):
    """A training method. It knows nothing of files, devices and processes."""

    Options: ClassVar[type[BaseModel]]

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: Any
    ) -> None: ...

    def prepare(self, batch: Batch, draws: Source) -> Prepared:
        """Everything that needs no gradients: samples, rewards, references. A pure function of its inputs."""
        ...

    def losses(self, group: Any, draws: Source) -> Iterator[Loss]:
        """The losses of one update on what `prepare` returned; called again for further updates, with other draws.

        Never yields inside `no_grad` or `lora.reference`.
        """
        ...
