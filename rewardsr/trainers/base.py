"""What a training method is: `prepare` looks, `losses` learns. The loop that runs it is `rewardsr.train.loop`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Source
from rewardsr.options import Options
from rewardsr.rewards.base import Reward

Scalar = float | Tensor  # a number, or a tensor of one number
MicroBatch = Annotated[int, Field(ge=1, le=10**6)] | Literal["auto"] | None  # of `trainer_options.micro_batch`


@dataclass(frozen=True)
class Loss:
    """Something to back-propagate.

    Attributes:
        value: scalar whose gradient is the method's; the loop back-propagates it at once and frees its graph.
            The gradients of all losses of a group add up to that of the method's loss.
        metrics: what to log; the loop averages each over the losses of a step that have it, weighted by `weight`.
            Scalar tensors without gradient stay where they are: to look at one would wait for the device.
        weight: share of the group's images behind this loss.
    """

    value: Tensor
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    weight: float = 1.0


class Prepared(Protocol):
    """What `prepare` returns; the loop reads its metrics and hands it to `losses`."""

    @property
    def metrics(self) -> Mapping[str, Scalar]:
        """What to log of the preparation."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    """Weights that are trained alike.

    Attributes:
        name: unique in the method; checkpoints keep weights and moments as `name/key`.
        parameters: by key, in a fixed order, float32.
        lora: name of the LoRA that they are. Weights of the base that are trained in full
            (`rewardsr.lora.train_in_full`) are switched with the LoRA "rewardsr", whether there is one or not.
        clip: largest norm of their gradient; None: the recipe's `optimiser.clip`.
        learning_rate: factor on the recipe's.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    lora: str = lora.NAME
    clip: float | None = None
    learning_rate: float = 1.0


class Method(ABC):
    """A training method. It knows nothing of files, devices and processes.

    A subclass writes `prepare` and `losses`, declares its options, and overrides of the rest what differs.

    Attributes:
        Options: its part of the recipe (`trainer_options`), a subclass of `rewardsr.Options`.
        micro_batch: rows in a network pass; None: all at once. Where the option of that name is "auto", the loop finds
            out how many fit, and changes it where memory runs out later.
        rows_per_image: rows of a pass with gradients that belong to one image; `Groups` sets it.
        rewarded: whether rewards steer it; a supervised method only watches them.
        differentiates: whether it back-propagates through the rewards; each is then probed before training.
        trains_encoders: whether its losses send gradients through `encode`; if not, a LoRA on the components that
            encode (`ISRAdapter.encoders`) stays as it is.

    Args:
        adapter: the pipeline, with our LoRA attached.
        rewards: what outputs are scored by, by name.
        weights: weight of each reward, above 0.
        options: of the method.

    Raises:
        UserError: pipeline, rewards or options that the method cannot work with.
    """

    Options: ClassVar[type[Options]] = Options
    rewarded: ClassVar[bool] = True
    differentiates: ClassVar[bool] = False
    trains_encoders: ClassVar[bool] = False

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: Any
    ) -> None:
        self.adapter, self.rewards, self.weights, self.options = adapter, rewards, weights, options
        chosen: int | str | None = getattr(options, "micro_batch", None)
        self.micro_batch = chosen if isinstance(chosen, int) else None
        self.rows_per_image = 1

    @classmethod
    def lora_targets(cls, adapter: ISRAdapter, options: Any) -> Mapping[str, Sequence[str]]:
        """What a fresh LoRA sits on, as of `lora.attach`; nothing: the method trains without one.

        Args:
            adapter: the pipeline.
            options: of the method.
        """
        return {**(adapter.encoder_targets if cls.trains_encoders else {}), **adapter.lora_targets}

    @abstractmethod
    def prepare(self, batch: Batch, draws: Source) -> Prepared:
        """Everything that needs no gradients: samples, rewards, references. A pure function of its inputs."""

    @abstractmethod
    def losses(self, group: Any, draws: Source) -> Iterator[Loss]:
        """The losses of one update on what `prepare` returned; called again for further updates, with other draws.

        Never yields inside `no_grad` or `reference`.
        """

    def parameters(self) -> list[ParameterGroup]:
        """What is trained; by default our LoRA, as far as the losses reach it."""
        own = {
            name: parameter
            for name, parameter in lora.parameters(self.adapter).items()
            if self.trains_encoders or name.partition(".")[0] not in self.adapter.encoders
        }
        return [ParameterGroup("lora", own)]

    @cached_property
    def trained(self) -> list[ParameterGroup]:
        """`parameters`, asked once."""
        return self.parameters()

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by `group/key`."""
        return {f"{group.name}/{key}": value for group in self.trained for key, value in group.parameters.items()}

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the pipeline is without what is trained, in the same networks: what methods compare with.

        A LoRA that is trained is off, so a run that starts from another LoRA (`lora.init`) is compared with the base,
        too; weights that are trained in full are as they are in the base, and LoRAs of other names as they were. Never
        back-propagate inside.
        """
        return lora.reference(self.adapter, *dict.fromkeys(group.lora for group in self.trained))

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images, (height, width) in pixels, that the method cannot take; called before training.

        Raises:
            UserError: it cannot.
        """

    @classmethod
    def needs_hq(cls, options: Any) -> str | None:
        """What of the method compares with HQ images under these options, in words, with the option; None: nothing.

        Asked before the pipeline is loaded; rewards say so themselves. By default a supervised method does.
        """
        return None if cls.rewarded else "supervised training"

    def after_update(self) -> None:
        """Called when the optimiser has changed the weights; not for a skipped update."""

    def shipped(self) -> AbstractContextManager[None]:
        """Inside, the adapter carries the weights that are validated, shown by checkpoints and left by the run."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the trained weights (an average of them, say)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError: it belongs to other weights.
        """


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Put values into tensors of the same names and shapes.

    Raises:
        KeyError: one is missing, or has another shape.
    """
    for name, value in target.items():
        if source[name].shape != value.shape:  # `copy_` would broadcast
            raise KeyError(name)
        value.copy_(source[name])
