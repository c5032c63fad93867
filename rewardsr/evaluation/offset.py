"""The constant-offset control: how much of a gain is one shift of the latents, the same for every image.

An autoencoder may have a direction of its latents that adds texture everywhere, or brightens every picture. A method
can find it instead of learning something of images, and a reward that measures how much there is, not where, pays for
it. So beside a claimed gain belongs what its mean latent change gives alone: a few numbers, and no LoRA.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.lora.layers import reference, tuned


@torch.no_grad()
def latent_offset(adapter: ISRAdapter, images: Iterable[Batch], seed: int = 0) -> Tensor:
    """What the LoRA adds to the latents on average, over space and images: a number a channel, (C,).

    Args:
        adapter: with the LoRA on.
        images: batches of one image each; base and tuned see the same noise.
        seed: of the noise.

    Raises:
        UserError: there is no LoRA, or there are no images.
    """
    if not tuned(adapter):
        raise UserError("a latent offset is that of a LoRA, and this pipeline carries none: load one first")

    def latents(place: int, batch: Batch) -> Tensor:
        draws = Draws(seed, 0, [place], "offset")
        condition = adapter.encode(batch.to(adapter.device), generator=draws if adapter.noisy_condition else None)
        return adapter.sample_latents(condition, draws)

    changes = []
    for place, batch in enumerate(images):
        with reference(adapter):
            base = latents(place, batch)
        changes.append((latents(place, batch) - base).mean((0, 2, 3)))
    if not changes:
        raise UserError("a latent offset is a mean over images, and there are none")
    return torch.stack(changes).mean(0)


@contextmanager
def shifted(adapter: ISRAdapter, offset: Tensor | None) -> Iterator[None]:
    """Inside, latents are decoded after `offset` (C,) is added; with None as they are, within another `shifted`."""
    before, plain = vars(adapter).get("decode"), type(adapter).decode.__get__(adapter)
    vars(adapter)["decode"] = (
        plain if offset is None else lambda z0, condition: plain(z0 + offset[:, None, None], condition)
    )
    try:
        yield
    finally:
        del vars(adapter)["decode"]
        if before is not None:
            vars(adapter)["decode"] = before
