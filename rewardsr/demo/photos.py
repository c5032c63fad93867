"""Photographs for the embedded pipeline: read from the scikit-image wheel, never downloaded.

`HELD_OUT` are four pictures that no weight and no setting was ever chosen on; `held_out()` degrades them in
one frozen way, so that figures of different versions can be compared. `TRAIN` are the others, and `Crops`
draws training pairs from them.
"""

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewardsr.data.degradation import Light, LightOptions

__all__ = [
    "FROZEN",
    "HELD_OUT",
    "LICENCES",
    "TRAIN",
    "TUNING",
    "Crops",
    "HeldOut",
    "development",
    "held_out",
    "load_photo",
    "write_folders",
]

_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle_left": "motorcycle_left.png",
    "motorcycle_right": "motorcycle_right.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
}

HELD_OUT: tuple[str, ...] = ("chelsea", "coffee", "camera", "rocket")
"""Names of the test pictures: never trained on, never tuned on."""

TRAIN: tuple[str, ...] = tuple(name for name in _FILES if name not in HELD_OUT)
"""Names of the training pictures."""

TUNING: tuple[str, ...] = (
    *("astronaut", "brick", "clock", "coins", "grass", "gravel", "ihc"),
    *("motorcycle_left", "motorcycle_right", "text"),
)
"""Training pictures for the demo's rewards: without the flat ones (moon, retina, cells, a page, the night sky), where
the noise that is left over decides which output of a group scores best."""

FROZEN = Light(LightOptions(blur=(0.7, 0.7), noise=(2.0, 2.0), quality=(90, 90)), 4)
"""The one degradation of the held-out test. Changing it makes all published figures void."""

_FROZEN_SEED = 7000

LICENCES: dict[str, str] = {
    "astronaut": "public domain (NASA)",
    "brick": "CC0 (CC0Textures)",
    "camera": "CC0 (Lav Varshney)",
    "cell": "CC0 (Paul Müller and others)",
    "chelsea": "CC0 (Stefan van der Walt)",
    "clock": "public domain (Stefan van der Walt)",
    "coffee": "CC0 (Rachel Michetti)",
    "coins": "no known copyright restrictions (Brooklyn Museum)",
    "grass": "CC0",
    "gravel": "CC0 (CC0Textures)",
    "hubble": "public domain (NASA)",
    "ihc": "no known copyright restrictions",
    "moon": "none stated by scikit-image",
    "motorcycle_left": "none stated by scikit-image (Middlebury 2014 stereo benchmark)",
    "motorcycle_right": "none stated by scikit-image (Middlebury 2014 stereo benchmark)",
    "page": "none stated by scikit-image",
    "retina": "CC0 (Mikael Häggström)",
    "rocket": "public domain (SpaceX)",
    "text": "public domain",
}
"""What the documentation of scikit-image says about each picture."""


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


@dataclass(frozen=True)
class HeldOut:
    """One test pair: `lq` `(3, h, w)` and `hq` `(3, 4h, 4w)`, float32 RGB in [0, 1]."""

    name: str
    lq: Tensor
    hq: Tensor


def photo_path(name: str) -> Path:
    """Path of a picture inside the installed scikit-image; FileNotFoundError says what to install."""
    if name not in _FILES:
        raise ValueError(f"unknown photograph {name!r}; expected one of {', '.join(_FILES)}")
    # find_spec does not import the package, which keeps scikit-image's own start-up cost out of ours.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the demo photographs come with scikit-image: pip install scikit-image")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / _FILES[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the data folder of scikit-image 0.26")
    return path


def load_photo(name: str) -> Tensor:
    """Load one picture as `(3, H, W)` float32 RGB in [0, 1]; gray pictures get three equal channels."""
    return _read(photo_path(name))


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The middle `(3, size, size)` of an image; ValueError if the image is smaller."""
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"size: expected at most {min(height, width)} for this photograph, got {size}")
    top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size].contiguous()


def held_out(size: int = 256) -> list[HeldOut]:
    """The frozen test: centre crops of the four held-out pictures, degraded by `FROZEN` with fixed seeds.

    `size` is the side of the crop in pixels, a multiple of 4. Published figures use 256.
    """
    pairs = []
    for index, name in enumerate(HELD_OUT):
        hq = centre_crop(load_photo(name), size)
        lq = FROZEN(hq, torch.Generator().manual_seed(_FROZEN_SEED + index))
        pairs.append(HeldOut(name, lq, hq))
    return pairs


def development() -> list[HeldOut]:
    """Four crops of the portrait that comes with matplotlib: neither trained on nor reported, only watched.

    Empty where matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return []
    path = Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        return []
    image = _read(path)
    pairs = []
    for index, (top, left) in enumerate(((0, 0), (0, 256), (256, 0), (256, 256))):
        hq = image[:, top : top + 256, left : left + 256].contiguous()
        pairs.append(HeldOut(f"portrait {index}", FROZEN(hq, torch.Generator().manual_seed(index)), hq))
    return pairs


class Crops:
    """Draws training pairs: crops of a pyramid of every photograph, varied and then degraded."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.light = Light(LightOptions(), 4)
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.levels = {name: _pyramid(load_photo(name)) for name in names}
        self.names = names
        self.weights = [_WEIGHTS.get(name, 1) for name in names]

    def batch(self, size: int, count: int) -> tuple[Tensor, Tensor]:
        """`lq` `(count, 3, size / 4, size / 4)` and `hq` `(count, 3, size, size)`."""
        pairs = []
        for _ in range(count):
            hq = self._vary(self._crop(size))
            pairs.append((self.light(hq, self.generator), hq))
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


def write_folders(root: str | Path) -> None:
    """Write image folders that the command line can use.

    `root/train/*.png` are the training pictures in `TUNING`; `root/val/lq/*.png` and `root/val/gt/*.png` are the
    held-out pairs. PNG keeps all values: the pictures are 8-bit already.
    """
    root = Path(root)
    for folder in ("train", "val/lq", "val/gt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in TUNING:
        _save_png(load_photo(name), root / "train" / f"{name}.png")
    for pair in held_out():
        _save_png(pair.lq, root / "val" / "lq" / f"{pair.name}.png")
        _save_png(pair.hq, root / "val" / "gt" / f"{pair.name}.png")


def _save_png(image: Tensor, path: Path) -> None:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)
