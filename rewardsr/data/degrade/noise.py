"""Noise of the Real-ESRGAN degradation. Numbers are drawn beforehand, on the CPU: one an element, whatever the image.

So an image that differs by rounding gets noise that differs by as little. Samplers that reject and draw again would go
on with other numbers from there.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from kornia.color import rgb_to_grayscale
from torch import Tensor

from rewardsr.transfer import to_device

_LEVELS = 256
_STEPS = 1 << 22  # probabilities are whole multiples of 1 / _STEPS, so that _LEVELS * _STEPS fits into 32 bits
_COARSE = 11  # bits of a number that mostly do not matter


@dataclass(frozen=True)
class Gaussian:
    """Adds sigma times the numbers.

    Attributes:
        sigma: standard deviation, for images in [0, 1].
        numbers: N(0, 1) float32, (3, H, W), or (1, H, W) for gray noise.
    """

    sigma: float
    numbers: Tensor

    def __call__(self, image: Tensor) -> Tensor:
        """The image (3, H, W) with noise."""
        return image + self.sigma * to_device(self.numbers, image.device)


@dataclass(frozen=True)
class Poisson:
    """Adds (Poisson(x v) / v - x) * scale, x being the image, or its gray values, in 8 bits, and v =
    2^ceil(log2(how many different values x has)).

    Attributes:
        scale: factor on the noise.
        numbers: uniform int32 in [0, 2^22), (3, H, W), or (1, H, W) for gray noise; see `drawn`.
    """

    scale: float
    numbers: Tensor

    @staticmethod
    def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Numbers of this shape."""
        return torch.randint(_STEPS, shape, generator=generator, dtype=torch.int32)

    def __call__(self, image: Tensor) -> Tensor:
        """The image (3, H, W) with noise."""
        source = rgb_to_grayscale(image) if len(self.numbers) == 1 else image
        levels = (source.clamp(0, 1) * 255).round().to(torch.int32)
        different = int(levels.flatten().bincount(minlength=_LEVELS).count_nonzero())
        v = 1 << (different - 1).bit_length()
        counts = _poisson(levels, v, to_device(self.numbers, image.device))
        return image + self.scale * (counts / v - levels / 255)


def _poisson(levels: Tensor, v: int, numbers: Tensor) -> Tensor:
    """Poisson counts of the rates levels / 255 * v: how many of a rate's cumulative probabilities each number reaches.

    The upper bits of a number mostly tell; the rest, one in twenty, are searched for.
    """
    line, known = (to_device(table, levels.device) for table in _tables(v))
    places = levels * _STEPS + numbers
    counts = known.index_select(0, (places >> _COARSE).flatten()).view(levels.shape)
    open_ = counts < 0
    counts[open_] = torch.searchsorted(line, places[open_], right=True, out_int32=True) - levels[open_] * _most(v)
    return counts


def _most(v: int) -> int:
    """More counts than a rate of v ever gives (12 standard deviations and some)."""
    return v + 12 * int(v**0.5) + 20


@lru_cache(maxsize=9)  # v is one of 1, 2, 4, ..., 256
def _tables(v: int) -> tuple[Tensor, Tensor]:
    """What `_poisson` looks counts up in, int32.

    Returns:
        P(count <= k) in steps, plus all steps of the levels below, by level and then by k: a line that rises; and the
        count by the upper bits of level * _STEPS + number, -1 where the lower ones decide.
    """
    levels = torch.arange(_LEVELS, dtype=torch.int32)[:, None]
    counts = torch.arange(_most(v), dtype=torch.float64)
    probabilities = torch.special.gammaincc(counts + 1, levels.double() * (v / 255))
    line = ((probabilities * _STEPS).round().to(torch.int32) + levels * _STEPS).flatten()
    first = torch.arange(_LEVELS * _STEPS >> _COARSE, dtype=torch.int32) << _COARSE
    least, most = (
        torch.searchsorted(line, places, right=True, out_int32=True) for places in (first, first + (1 << _COARSE) - 1)
    )
    known = torch.where(least == most, least - (first // _STEPS) * _most(v), -1)
    return line, known
