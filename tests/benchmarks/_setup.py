"""A run's set-up as `rewardsr.train.prepare` would make it, on networks and images that were never in a file."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _released import Released
from _sizes import images
from accelerate import Accelerator
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.options import parse
from rewardsr.rewards import build
from rewardsr.train import loop
from rewardsr.train import recipe as recipes
from rewardsr.train.checkpoint import State
from rewardsr.train.prepare import Setup
from rewardsr.trainers.base import Method
from rewardsr.trainers.gdpo import GDPO, GDPOOptions
from rewardsr.trainers.preferences import group_advantages

SCALE = 4
_SEEDS = itertools.count()
FORMS = ("paper", "conditional", "shared")


class Images:
    """Endless crops, each with a prompt of its own, as in a first epoch with one caption an image."""

    def __init__(self, crop: int, fixed_prompt: bool) -> None:
        self._crop, self._fixed = crop, fixed_prompt

    def batch(self, seed: int, indices: list[int]) -> Batch:
        """The crops of these indices."""
        hq = images(len(indices), self._crop, seed + indices[0])
        lq = torch.nn.functional.interpolate(hq, scale_factor=1 / SCALE, mode="area")
        prompts = tuple("a photo" if self._fixed else f"photo {index} of {seed}" for index in indices)
        return Batch(lq=lq, hq=hq, prompts=prompts)

    def prefetch(self, seed: int, indices: list[int]) -> None:
        """Nothing to load."""


def precision(chosen: Namespace) -> torch.dtype:
    """What the base computes in."""
    bf16 = chosen.precision == "bf16" or (chosen.precision == "auto" and torch.device(chosen.device).type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def compile_networks(adapter: Any) -> None:
    """`--compile`: UNet and autoencoder, in place."""
    torch._dynamo.config.cache_size_limit = 64  # policy and reference, one image and a group: variants of a graph
    for module in (adapter.unet, adapter.vae.encoder, adapter.vae.decoder):
        module.compile()


def method_of(adapter: Any, chosen: Namespace, form: str) -> Method:
    """GDPO in one of `FORMS`; "shared" is the conditional one with one noise for a group."""
    options = GDPOOptions(
        group_size=chosen.group,
        preference="paper" if form == "paper" else "conditional",
        shared_noise=form == "shared",
        micro_batch=chosen.micro_batch,
    )
    names = [name for name in chosen.rewards.split(",") if name]
    return GDPO(adapter, {name: build(name) for name in names}, dict.fromkeys(names, 1.0), options)


def set_up(adapter: Any, method: Method, chosen: Namespace, batch: int) -> Setup:
    """Everything that the loop's step needs; each with a seed, and so with prompts, of its own."""
    content: dict[str, Any] = {
        "base": "random",
        "output": "nowhere",
        "data": {"train": "random", "crop": chosen.crop},
        "rewards": [{"name": name} for name in method.rewards],
        "trainer_options": method.options.model_dump(),
        "steps": 1_000_000,
        "seed": next(_SEEDS),
        "batch_size": batch,
        "gradient_checkpointing": chosen.gradient_checkpointing,
    }
    return Setup(
        recipe=parse(recipes.Recipe, content, "benchmark"),
        accelerator=Accelerator(cpu=torch.device(chosen.device).type == "cpu"),
        adapter=adapter,
        method=method,
        data=Images(chosen.crop, chosen.fixed_prompt),  # type: ignore[arg-type]
        validation=None,
        metrics=method.rewards,
        notes=(),
    )


class Ours:
    """The real training of a set-up, step by step; the first step makes the optimiser's moments."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._state = setup, State()
        self._optimiser = loop.make_optimiser(setup)

    def step(self) -> None:
        """The run's next step."""
        loop.step(self._setup, self._optimiser, self._state)

    def holds(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from weights(self._setup.adapter)
        yield from moments(self._optimiser)


class Theirs:
    """Training with a released step, on the same images and with as much around it as needs be.

    Args:
        setup: of our run; its weights are trained, by an optimiser of their own.
        released: the step.
        second: the reference network that it keeps.
    """

    def __init__(self, setup: Setup, released: Released, second: Any) -> None:
        self._setup, self._released, self._second, self._taken = setup, released, second, 0
        self._trained = list(setup.method.trained_weights().values())
        self._optimiser = torch.optim.AdamW(self._trained, lr=setup.recipe.optimiser.learning_rate)

    def step(self) -> None:
        """The next step."""
        size, device = self._setup.recipe.batch_size, self._setup.accelerator.device
        indices = [self._taken * size + place for place in range(size)]
        batch = self._setup.data.batch(self._setup.recipe.seed, indices).to(device)
        self._optimiser.zero_grad(set_to_none=True)
        sources = (Draws(0, self._taken, list(range(size)), stream) for stream in ("group", "update-0"))
        loss = self._released.step(batch, *sources)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimiser.step()
        self._taken += 1
        assert loss.isfinite()

    def holds(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from weights(self._setup.adapter)
        yield from self._second.parameters()
        yield from moments(self._optimiser)


def weights(adapter: Any) -> Iterator[Tensor]:
    """Of all networks of a pipeline."""
    for network in (*adapter.networks.values(), adapter._text_encoder):
        yield from network.parameters()


def moments(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What an optimiser remembers."""
    for state in optimiser.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def judge(method: Any) -> Callable[[Tensor, Batch], Tensor]:
    """Advantages (B, G) of outputs as GDPO-SR has them, of our method's rewards."""

    def advantages(sr: Tensor, batch: Batch) -> Tensor:
        group, ones = method.options.group_size, torch.ones(len(batch), device=sr.device)
        members = batch.repeat(group)
        scores = {
            name: reward(sr, members).float().unflatten(0, (-1, group)) for name, reward in method.rewards.items()
        }
        return group_advantages(scores, {name: ones * method.weights[name] for name in scores})

    return advantages
