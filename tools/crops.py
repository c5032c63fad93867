"""What the embedded pipeline was trained on and watched on: crops of photographs that come with scikit-image."""

import importlib.util
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.demo import photos

TRAIN: tuple[str, ...] = (
    *("astronaut", "brick", "cell", "clock", "coins"),
    *("grass", "gravel", "hubble", "ihc", "moon"),
    *("motorcycle_left", "motorcycle_right", "page", "retina", "text"),
)
"""Names of the training pictures: all that are not held out."""

# How often a training picture is drawn, 1 where not named. Pictures of things come first: text, cells and stars
# look unlike what people enlarge.
_WEIGHTS = {
    "astronaut": 5,
    "motorcycle_left": 4,
    "motorcycle_right": 4,
    "coins": 3,
    "clock": 2,
    "grass": 2,
    "gravel": 2,
}


def development() -> list[photos.HeldOut]:
    """Four crops of the portrait that comes with matplotlib: neither trained on nor reported, only watched.

    Empty where matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return []
    path = Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        return []
    image = photos.read_photo(path)
    pairs = []
    for index, (top, left) in enumerate(((0, 0), (0, 256), (256, 0), (256, 256))):
        hq = image[:, top : top + 256, left : left + 256].contiguous()
        lq = photos.FROZEN(hq[None], [torch.Generator().manual_seed(index)])[0]
        pairs.append(photos.HeldOut(f"portrait {index}", lq, hq))
    return pairs


class Crops:
    """Draws training pairs: crops of a pyramid of every photograph, varied and then degraded."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.light = Light(LightOptions(), scale=4)
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.levels = {name: _pyramid(photos.load_photo(name)) for name in names}
        self.names = names
        self.weights = [_WEIGHTS.get(name, 1) for name in names]

    def batch(self, size: int, count: int) -> tuple[Tensor, Tensor]:
        """`lq` `(count, 3, size / 4, size / 4)` and `hq` `(count, 3, size, size)`."""
        pairs = []
        for _ in range(count):
            hq = self._vary(self._crop(size))
            pairs.append((self.light(hq[None], [self.generator])[0], hq))
        return torch.stack([lq for lq, _ in pairs]), torch.stack([hq for _, hq in pairs])

    def _crop(self, size: int) -> Tensor:
        name = self.draw.choices(self.names, self.weights)[0]
        image = self.draw.choice([level for level in self.levels[name] if min(level.shape[1:]) >= size])
        top = self.draw.randint(0, image.shape[1] - size)
        left = self.draw.randint(0, image.shape[2] - size)
        return image[:, top : top + size, left : left + size]

    def _vary(self, hq: Tensor) -> Tensor:
        draw = self.draw
        if draw.random() < 0.5:
            hq = hq.transpose(1, 2)
        hq = hq.flip([axis for axis in (1, 2) if draw.random() < 0.5])
        if draw.random() < 0.5:
            hq = hq[draw.sample(range(3), 3)]
        if draw.random() < 0.5 and torch.equal(hq[0], hq[1]):
            # Most textures are gray pictures: a random ramp of colours turns them into colour textures.
            dark, bright = torch.rand(2, 3, 1, 1, generator=self.generator)
            hq = dark * 0.5 + (0.5 + 0.5 * bright - 0.5 * dark) * hq
        elif draw.random() < 0.5:
            contrast = draw.uniform(0.4, 1.0)
            hq = hq * contrast + draw.uniform(0, 1 - contrast)
        return hq.clamp(0, 1).contiguous()


def _pyramid(image: Tensor) -> list[Tensor]:
    """The picture at full, 0.7, 0.5 and 0.35 size: small copies are crisper and show more at once."""
    levels = [image]
    for factor in (0.7, 0.5, 0.35):
        small = F.interpolate(image[None], scale_factor=factor, mode="bicubic", antialias=True)[0].clamp(0, 1)
        if min(small.shape[1:]) >= 64:
            levels.append(small)
    return levels
