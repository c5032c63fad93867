"""Photographs for the demo: read from the scikit-image wheel, never downloaded.

`HELD_OUT` are four pictures that no weight and no setting was ever chosen on; `held_out()` degrades them in one frozen
way, so that figures of different versions can be compared. README.md beside this file lists rights to the pictures.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardsr.data.degrade.light import Light, LightOptions

__all__ = ["FROZEN", "HELD_OUT", "TUNING", "HeldOut", "held_out", "load_photo", "write_folders"]

HELD_OUT: tuple[str, ...] = ("chelsea", "coffee", "camera", "rocket")
"""Names of the test pictures: never trained on, never tuned on."""

TUNING: tuple[str, ...] = (
    *("astronaut", "brick", "clock", "coins", "grass", "gravel", "ihc"),
    *("motorcycle_left", "motorcycle_right", "text"),
)
"""Training pictures of the demo: without flat ones (moon, retina, cells, a page, the night sky), where the noise that
is left over decides which output of a group scores best."""

FROZEN = Light(LightOptions(blur=(0.7, 0.7), noise=(2.0, 2.0), quality=(90, 90)), 4)
"""The one degradation of the held-out test. Changing it makes all published figures void."""

_FROZEN_SEED = 7000
# Files of scikit-image that are not called NAME.png.
_FILES = {
    "clock": "clock_motion.png",
    "hubble": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}


@dataclass(frozen=True)
class HeldOut:
    """One test pair: `lq` `(3, h, w)` and `hq` `(3, 4h, 4w)`, float32 RGB in [0, 1]."""

    name: str
    lq: Tensor
    hq: Tensor


def photo_path(name: str) -> Path:
    """Path of a picture inside the installed scikit-image; FileNotFoundError says what to install."""
    # find_spec does not import the package, which keeps scikit-image's own start-up cost out of ours.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the demo photographs come with scikit-image: pip install scikit-image")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / _FILES.get(name, f"{name}.png")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the data folder of scikit-image 0.26")
    return path


def load_photo(name: str) -> Tensor:
    """Load one picture as `(3, H, W)` float32 RGB in [0, 1]; gray pictures get three equal channels."""
    return read_photo(photo_path(name))


def read_photo(path: Path) -> Tensor:
    """An image file as `(3, H, W)` float32 RGB in [0, 1]."""
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
        lq = FROZEN(hq[None], [torch.Generator().manual_seed(_FROZEN_SEED + index)])[0]
        pairs.append(HeldOut(name, lq, hq))
    return pairs


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
