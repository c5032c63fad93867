"""What a training method is: `prepare` looks, `losses` learns. The loop that runs it is in `rewardsr.train.loop`."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

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
    """A training method. It knows nothing of files, devices and processes.

    One that cannot take images of every size also writes `check_size(size)`, which raises UserError for (height, width)
    in pixels; it is called with the size of the crops before training.

    Attributes:
        Options: its part of the recipe (`trainer_options`).
        differentiates: whether it back-propagates through the rewards; each is then probed before training.
    """

    Options: ClassVar[type[BaseModel]]
    differentiates: ClassVar[bool]

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


@runtime_checkable
class Stateful(Protocol):
    """A method with state of its own beside the LoRA (an average of it, say) writes these as well.

    The weights inside `shipped` are the ones that are validated, that checkpoints show and that the run leaves.
    """

    def after_update(self) -> None:
        """Called when the optimiser has changed the LoRA; not for a skipped update."""
        ...

    def shipped(self) -> AbstractContextManager[None]:
        """Inside, the adapter carries the weights that are meant for use."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, the weights being trained included where they are not the shipped."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError: it belongs to another LoRA.
            ValueError: it holds values that are not finite.
        """
        ...


def shipped(method: Method) -> AbstractContextManager[None]:
    """Inside, the adapter carries the weights that a run is made for: the method's choice, else the trained ones."""
    return method.shipped() if isinstance(method, Stateful) else nullcontext()
