"""What the Real-ESRGAN degradation draws for one image, all of it before the image is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rewardsr.data.degrade.kernels import FAMILIES, Hill, Sinc
from rewardsr.data.degrade.noise import Gaussian, Poisson
from rewardsr.data.degrade.settings import KernelOptions, Mode, PassOptions, RealESRGANOptions

T = TypeVar("T")
Size = tuple[int, int]


@dataclass(frozen=True)
class DrawnPass:
    """One pass over an image.

    Attributes:
        kernel: of the blur; None: no blur.
        size: height and width after the resize.
        mode: of the resize.
        noise: what adds it.
        quality: of JPEG.
    """

    kernel: Hill | Sinc | None
    size: Size
    mode: Mode
    noise: Gaussian | Poisson
    quality: int


@dataclass(frozen=True)
class Drawn:
    """Both passes over an image, and its end.

    Attributes:
        first, second: the passes.
        mode: of the last resize.
        sinc: the last filter; None: there is none.
        jpeg_last: JPEG of the second pass comes after these two, and not before.
    """

    first: DrawnPass
    second: DrawnPass
    mode: Mode
    sinc: Sinc | None
    jpeg_last: bool


def draw_passes(options: RealESRGANOptions, scale: int, hq: Size, generator: torch.Generator) -> Drawn:
    """All that is random about an image.

    Every choice takes one number, whatever comes of it, and noise has a generator of its own: another range or
    probability changes what it is about, and nothing else.

    Args:
        options: ranges and probabilities.
        scale: HQ is this many times LQ.
        hq: height and width of the HQ image.
        generator: of the image.
    """
    chance = _Chance(generator)
    return Drawn(
        first=_pass(options, options.first, hq, chance),
        second=_pass(options, options.second, (hq[0] // scale, hq[1] // scale), chance),
        mode=chance.one_of(options.modes),
        sinc=_last(options, chance),
        jpeg_last=chance.happens(options.second.jpeg_last),
    )


def _pass(options: RealESRGANOptions, own: PassOptions, size: Size, chance: "_Chance") -> DrawnPass:
    """A pass whose resize is relative to this size."""
    kernel = _kernel(options.kernel, own, chance)
    size = _resized(size, own, chance)
    mode = chance.one_of(options.modes)
    return DrawnPass(kernel, size, mode, _noise(own, size, chance), chance.whole(own.quality))


def _noise(own: PassOptions, size: Size, chance: "_Chance") -> Gaussian | Poisson:
    gaussian = chance.happens(own.gaussian)
    sigma, scale = chance.uniform(own.noise) / 255, chance.uniform(own.poisson)
    shape = (1 if chance.happens(own.gray) else 3, *size)
    generator = torch.Generator().manual_seed(chance.whole((0, 2**53 - 1)))
    if gaussian:
        return Gaussian(sigma, torch.randn(shape, generator=generator))
    return Poisson(scale, Poisson.drawn(shape, generator))


def _last(options: RealESRGANOptions, chance: "_Chance") -> Sinc | None:
    wanted = chance.happens(options.second.sinc)
    sinc = Sinc(_size(options.kernel, chance), chance.uniform(options.second.sinc_cutoff))
    return sinc if wanted else None


def _size(options: KernelOptions, chance: "_Chance") -> int:
    low, high = options.size
    return low + 2 * chance.whole((0, (high - low) // 2))


def _kernel(options: KernelOptions, own: PassOptions, chance: "_Chance") -> Hill | Sinc | None:
    blurred = chance.happens(own.blur)
    size = _size(options, chance)
    sinc = chance.happens(options.sinc)
    cutoff = chance.uniform(options.sinc_cutoff if size < options.large else options.large_sinc_cutoff)
    family = chance.one_of(FAMILIES, list(options.family.shares().values()))
    sigma = (chance.uniform(own.sigma), chance.uniform(own.sigma))
    rotation = chance.uniform(options.rotation)
    low, high = options.plateau_beta if family.startswith("plateau") else options.generalized_beta
    beta = chance.uniform((low, 1) if chance.happens(0.5) else (1, high))
    if not blurred:
        return None
    return Sinc(size, cutoff) if sinc else Hill(family, size, sigma, rotation, beta)


def _resized(size: Size, own: PassOptions, chance: "_Chance") -> Size:
    """The size (height, width) times a factor, cut to whole pixels."""
    kind = chance.one_of(("up", "down", "keep"), (own.up, own.down, 1 - own.up - own.down))
    up, down = chance.uniform(own.up_factor), chance.uniform(own.down_factor)
    factor = {"up": up, "down": down, "keep": 1.0}[kind]
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


class _Chance:
    """Choices that take one number each."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def uniform(self, bounds: tuple[float, float]) -> float:
        """A number in the range."""
        return bounds[0] + (bounds[1] - bounds[0]) * self._number()

    def whole(self, bounds: tuple[int, int]) -> int:
        """A whole number in the range, both ends included."""
        return bounds[0] + int((bounds[1] - bounds[0] + 1) * self._number())

    def happens(self, probability: float) -> bool:
        """Whether something of this probability does."""
        return self._number() < probability

    def one_of(self, things: Sequence[T], shares: Sequence[float] | None = None) -> T:
        """One of several, by their shares or alike."""
        number = self._number() * (len(things) if shares is None else sum(shares))
        for thing, share in zip(things, shares or [1.0] * len(things), strict=True):
            number -= share
            if number < 0:
                return thing
        return things[-1]

    def _number(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))
