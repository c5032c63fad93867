"""What the embedded pipeline is trained on: varied crops of a folder of photographs."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.images import list_images

LONGEST = 1400  # pixels: larger photographs are made smaller, which makes them crisper, too
LEVELS = (1.0, 0.7, 0.5, 0.35)  # sizes that a photograph is shown in: small copies show more at once
SMALLEST = 128  # pixels a side of a level


class Crops:
    """Draws training images: crops of a pyramid of every photograph, varied, and degraded where pairs are asked for."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.light = Light(LightOptions(), scale=4)
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pyramids = [pyramid(path) for path in list_images(folder)]

    def images(self, size: int, count: int) -> Tensor:
        """`hq` `(count, 3, size, size)` float32 in [0, 1]."""
        return torch.stack([self._vary(self._crop(size)) for _ in range(count)])

    def batch(self, size: int, count: int) -> tuple[Tensor, Tensor]:
        """`lq` `(count, 3, size / 4, size / 4)` and `hq` `(count, 3, size, size)`."""
        hq = self.images(size, count)
        return self.light(hq, [self.generator] * count), hq

    def _crop(self, size: int) -> Tensor:
        level = self.draw.choice([level for level in self.draw.choice(self.pyramids) if min(level.size) >= size])
        left, top = self.draw.randint(0, level.width - size), self.draw.randint(0, level.height - size)
        pixels = np.asarray(level.crop((left, top, left + size, top + size)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def _vary(self, hq: Tensor) -> Tensor:
        draw = self.draw
        if draw.random() < 0.5:
            hq = hq.transpose(1, 2)
        hq = hq.flip([axis for axis in (1, 2) if draw.random() < 0.5])
        if draw.random() < 0.25:
            hq = hq[draw.sample(range(3), 3)]
        if draw.random() < 0.5 and torch.equal(hq[0], hq[1]):
            # A random ramp of colours turns a gray picture into a coloured one.
            dark, bright = torch.rand(2, 3, 1, 1, generator=self.generator)
            hq = dark * 0.5 + (0.5 + 0.5 * bright - 0.5 * dark) * hq
        elif draw.random() < 0.3:
            contrast = draw.uniform(0.4, 1.0)
            hq = hq * contrast + draw.uniform(0, 1 - contrast)
        return hq.clamp(0, 1).contiguous()


def pyramid(path: Path) -> list[Image.Image]:
    """A photograph in all sizes that are large enough, RGB of 8 bits."""
    with Image.open(path) as image:
        whole = image.convert("RGB")
    whole.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    sizes = [(round(whole.width * level), round(whole.height * level)) for level in LEVELS]
    return [whole.resize(size, Image.Resampling.LANCZOS) for size in sizes if min(size) >= SMALLEST]


def write_levels(photographs: Path, out: Path) -> None:
    """Write every size of every photograph to a folder that a recipe's `data.train` can name."""
    out.mkdir(parents=True)
    for path in list_images(photographs):
        for place, level in enumerate(pyramid(path)):
            level.save(out / f"{path.stem}-{place}.png")
