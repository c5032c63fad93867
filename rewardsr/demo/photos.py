"""Photographs of the demo, which come with the package: README.md beside this file says who took them.

`HELD_OUT` are pictures that no weight and no setting was ever chosen on. `held_out` degrades them in a fixed way, so
that figures of different versions can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.images import list_images, read_image, write_image

__all__ = ["HELD_OUT", "KNOWN", "SOFT", "TRAIN", "HeldOut", "held_out", "write_folders"]

TRAIN = Path(__file__).parent / "photographs" / "train"
"""Folder of the pictures to tune on, 384 px a side; the embedded pipeline was trained on them as well."""

HELD_OUT = Path(__file__).parent / "photographs" / "held_out"
"""Folder of the test pictures, 256 px a side: never trained on, never tuned on."""

KNOWN = LightOptions(blur=(0.7, 0.7), noise=(2.0, 2.0), quality=(90, 90))
"""The middle of what the embedded pipeline was trained for. Changing it makes the base's figures void."""

SOFT = LightOptions(blur=(2.5, 2.5), noise=(1.0, 1.0), quality=(95, 95))
"""What the demo tunes for: a soft lens, of which the pipeline has seen nothing. Changing it makes its figures void."""

_SEED = 7000
_SCALE = 4


@dataclass(frozen=True)
class HeldOut:
    """One test pair: `lq` `(3, 64, 64)` and `hq` `(3, 256, 256)`, float32 RGB in [0, 1]."""

    name: str
    lq: Tensor
    hq: Tensor


def held_out(degradation: LightOptions = KNOWN) -> Iterator[HeldOut]:
    """The test: the held-out pictures by name, degraded in one way with fixed seeds."""
    degrade = Light(degradation, _SCALE)
    for index, path in enumerate(list_images(HELD_OUT)):
        hq = read_image(path)
        lq = degrade(hq[None], [torch.Generator().manual_seed(_SEED + index)])[0]
        yield HeldOut(path.stem, lq, hq)


def write_folders(root: str | Path, degradation: LightOptions = KNOWN) -> None:
    """Write image folders that the command line can use.

    `root/train/*.png` are the pictures to tune on; `root/val/lq/*.png` and `root/val/gt/*.png` are the held-out pairs.
    PNG keeps all values: the pictures are 8-bit already.
    """
    root = Path(root)
    for folder in ("train", "val/lq", "val/gt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path in list_images(TRAIN):
        write_image(read_image(path), root / "train" / f"{path.stem}.png")
    for pair in held_out(degradation):
        write_image(pair.lq, root / "val" / "lq" / f"{pair.name}.png")
        write_image(pair.hq, root / "val" / "gt" / f"{pair.name}.png")
