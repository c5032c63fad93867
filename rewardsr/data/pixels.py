"""Decoded images of one item, HQ, LQ or both, and what is cut out of them in step."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A sample's images.

    Attributes:
        hq: (3, H, W) float32 in [0, 1]; None where there is none.
        lq: (3, H / scale, W / scale) float32 in [0, 1].
    """

    hq: Tensor | None
    lq: Tensor


@dataclass(frozen=True)
class Decoded:
    """Decoded images, uint8 or float32 in [0, 1]; not to be written to.

    Attributes:
        hq: (3, H, W); None where there is none.
        lq: (3, H / scale, W / scale); None where it is made by degradation.
        scale: HQ is this many times LQ.
    """

    hq: Tensor | None
    lq: Tensor | None
    scale: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Height and width of the target in pixels, there or not."""
        if self.hq is not None:
            return self.hq.shape[1], self.hq.shape[2]
        assert self.lq is not None
        return self.lq.shape[1] * self.scale, self.lq.shape[2] * self.scale

    @property
    def step(self) -> int:
        """Where there is an LQ image, a corner in HQ pixels must lie on its pixels: at multiples of this."""
        return 1 if self.lq is None else self.scale

    def padded(self, crop: int) -> "Decoded":
        """With sides of at least `crop` HQ pixels. Mirrored at the edge, so that pairs stay aligned."""
        hq = None if self.hq is None else _mirrored(self.hq, crop)
        return Decoded(hq, None if self.lq is None else _mirrored(self.lq, crop // self.scale), self.scale)

    def cut(self, corner: tuple[int, int], size: tuple[int, int], flip: bool) -> tuple[Tensor | None, Tensor | None]:
        """A part of both as float32, mirrored or not; corner and size in HQ pixels, multiples of `step`."""
        small = [(a // self.scale, b // self.scale) for a, b in (corner, size)]
        hq = None if self.hq is None else _cut(self.hq, corner, size, flip)
        return hq, (None if self.lq is None else _cut(self.lq, small[0], small[1], flip))


def as_floats(image: Tensor) -> Tensor:
    """uint8 or float32 image values as a copy, float32 in [0, 1]."""
    floats = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return floats.div_(255) if image.dtype == torch.uint8 else floats


def _cut(image: Tensor, corner: tuple[int, int], size: tuple[int, int], flip: bool) -> Tensor:
    part = as_floats(image[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]])
    return part.flip(-1) if flip else part


def _mirrored(image: Tensor, least: int) -> Tensor:
    """An image whose sides have at least so many pixels: to the right and below, its mirror images."""
    for side in (1, 2):
        length = image.shape[side]
        if length < least:
            places = torch.arange(least) % (2 * length)
            image = image.index_select(side, torch.minimum(places, 2 * length - 1 - places))
    return image
