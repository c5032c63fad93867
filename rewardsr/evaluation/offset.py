"""The constant-offset control: how much of a gain is one shift of the latents, the same for every image.

An autoencoder may have a direction of its latents that adds texture everywhere, or brightens every picture. A method
can find it instead of learning something of images, and a reward that measures how much there is, not where, pays for
it. So beside a claimed gain belongs what its mean latent change gives alone (a few numbers, and no LoRA), and what the
LoRA gives without it. `HeldOut` and `evaluate` score both, `Cast` holds what came out.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardsr import progress
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.evaluation.cast import Cast, OffsetTest
from rewardsr.evaluation.comparison import Comparison
from rewardsr.lora.layers import reference, tuned


@dataclass(frozen=True)
class Offset:
    """A constant offset of the latents, and where it comes from.

    Attributes:
        numbers: (C,), one a channel.
        measured_on: which images, in words.
    """

    numbers: Tensor
    measured_on: str


@torch.no_grad()
def latent_offset(
    adapter: ISRAdapter,
    images: Iterable[Batch],
    measured_on: str,
    *,
    count: int | None = None,
    seed: int = 0,
    draws_per_image: int = 1,
) -> Offset:
    """What the LoRA adds to the latents on average over space, draws of noise and images: a number a channel.

    The latents are those that are decoded (z0), at the end of the pipeline's own sampler with its own guidance; of
    several steps, too. Base and tuned begin with the same noise and draw the same in every step; the condition is
    encoded by each. One number a channel and image is kept, no latents. Of a LoRA that changes the decoder as well,
    this is the part that it has in the latents.

    Args:
        adapter: with the LoRA on.
        images: batches of one image each, with HQ or without.
        measured_on: the images, in words.
        count: how many there are, for a bar with an ETA.
        seed: of the noise, which is none of that of `HeldOut`.
        draws_per_image: draws of noise; a pipeline without noise takes one.

    Raises:
        UserError: there is no LoRA, or there are no images.
    """
    if not tuned(adapter):
        raise UserError("a latent offset is that of a LoRA, and this pipeline carries none: load one first")

    def latents(place: int, draw: int, batch: Batch) -> Tensor:
        draws = Draws(seed, draw, [place], "offset")
        condition = adapter.encode(batch.to(adapter.device), generator=draws if adapter.noisy_condition else None)
        return adapter.sample_latents(condition, draws)

    changes = []
    with progress.bar("cast test: offset", count) as advance:
        for place, batch in enumerate(images):
            for draw in range(1 if adapter.deterministic else draws_per_image):
                with reference(adapter):
                    base = latents(place, draw, batch)
                changes.append((latents(place, draw, batch) - base).mean((0, 2, 3)))
            advance()
    if not changes:
        raise UserError("a latent offset is a mean over images, and there are none")
    return Offset(torch.stack(changes).mean(0), measured_on)


@contextmanager
def shifted(adapter: ISRAdapter, numbers: Tensor) -> Iterator[None]:
    """Inside, latents are decoded after `numbers` (C,) are added to every place of them."""
    plain = adapter.decode
    vars(adapter)["decode"] = lambda z0, condition: plain(z0 + numbers[:, None, None], condition)
    try:
        yield
    finally:
        del vars(adapter)["decode"]


def cast_of(sides: Mapping[str, Mapping[str, tuple[float, ...]]], offset: Offset) -> Cast:
    """The cast test, of what was scored.

    Args:
        sides: the scores by metric of "base", "tuned", "alone" (base + offset) and "without" (tuned - offset).
        offset: what it was.
    """

    def compared(before: str, after: str, metric: str) -> Comparison:
        return Comparison.of(sides[before][metric], sides[after][metric])

    pairs = (("base", "tuned"), ("base", "alone"), ("base", "without"), ("alone", "tuned"))
    tests = {metric: OffsetTest(*(compared(*pair, metric) for pair in pairs)) for metric in sides["base"]}
    return Cast(tuple(offset.numbers.tolist()), offset.measured_on, tests)
