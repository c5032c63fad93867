"""Plug-ins as another package brings them, one of each group; `test_plugins.py` installs it."""

from collections.abc import Sequence
from typing import Any

import torch
from taggers import Means
from torch import Tensor

from rewardsr import options
from rewardsr.adapters.stable_diffusion import Parts, StableDiffusion, load_parts, parts_of
from rewardsr.batch import Condition
from rewardsr.draws import Source, draw
from rewardsr.rewards.fidelity import PSNR
from rewardsr.trainers.gdpo import GDPO

__all__ = ["Captions", "Doubling", "Gentle", "Luma", "Means", "Thin"]


class Doubling(StableDiffusion):
    """Twice as large, which only the loaded pipeline knows."""

    name = "doubling"
    steps, noise_t = (100,), 250

    def __init__(self, parts: Parts, base: str, options: StableDiffusion.Options) -> None:
        super().__init__(parts, base, options, 2)

    @classmethod
    def load(cls, base: str, options: StableDiffusion.Options) -> "Doubling":
        return cls(load_parts(base), base, options)

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        return getattr(pipe, "doubles", False)

    @classmethod
    def from_pipeline(cls, pipe: Any, options: StableDiffusion.Options) -> "Doubling":
        return cls(*parts_of(pipe), options)

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        noise = draw(condition.latents.shape, generator, device=condition.latents.device)
        return self.schedule.add_noise(condition.latents, noise, self.noise_t)


class Promising(Doubling):
    """Says before it is loaded what is not so afterwards."""

    @classmethod
    def scale_of(cls, options: StableDiffusion.Options) -> int:
        return 4


class Loose(Doubling):
    """Its options would not refuse a misspelt key."""

    Options = dict


class Gentle(GDPO):
    """A trainer."""


class LooseTrainer(GDPO):
    """Its options would not refuse a misspelt key."""

    Options = dict


class Luma(PSNR):
    """A reward."""

    name = "luma"


class Thin:
    """A degradation: every scale-th pixel."""

    Options = options.Options

    def __init__(self, options: options.Options, scale: int) -> None:
        self.scale = scale

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return hq[..., :: self.scale, :: self.scale]


class Captions:
    """A captioner."""

    def __call__(self, images: Tensor) -> list[str]:
        return ["a photo"] * len(images)
