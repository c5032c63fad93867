"""Kernels of the Real-ESRGAN degradation, and the filter itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from rewardsr.transfer import to_device

Family = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Hill:
    """A blur kernel: Gaussian exp(-q / 2), generalised exp(-q^beta / 2) or plateau 1 / (1 + q^beta), with sum 1.

    With q = p' S^-1 p of a point p = (x, y) and the covariance S = R(rotation) diag(sigma_x^2, sigma_y^2) R(rotation)'.

    Attributes:
        family: one of the three, and whether it is round (iso), with sigma_x for both axes.
        size: pixels a side, odd.
        sigma: of the two axes in pixels, above 0.
        rotation: of the axes in radians, from x to y; of no effect on round ones.
        beta: exponent, above 0; of no effect on Gaussian ones.
    """

    family: Family
    size: int
    sigma: tuple[float, float]
    rotation: float
    beta: float

    def tensor(self) -> Tensor:
        """(size, size) float64."""
        x, y = _coordinates(self.size)
        sigma_x, sigma_y = self.sigma if self.family.endswith("aniso") else (self.sigma[0], self.sigma[0])
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        q = ((cos * x + sin * y) / sigma_x).square() + ((cos * y - sin * x) / sigma_y).square()
        if self.family.startswith("generalized"):
            hill = torch.exp(-0.5 * q**self.beta)
        elif self.family.startswith("plateau"):
            hill = 1 / (1 + q**self.beta)
        else:
            hill = torch.exp(-0.5 * q)
        return hill / hill.sum()


@dataclass(frozen=True)
class Sinc:
    """The circular low-pass filter: cutoff J1(cutoff r) / (2 pi r), and cutoff^2 / (4 pi) at the centre, with sum 1.

    Attributes:
        size: pixels a side, odd.
        cutoff: frequency in radians a pixel, above 0, pi at most; what oscillates faster is taken out.
    """

    size: int
    cutoff: float

    def tensor(self) -> Tensor:
        """(size, size) float64."""
        x, y = _coordinates(self.size)
        r = torch.hypot(x, y)
        wave = self.cutoff * torch.special.bessel_j1(self.cutoff * r) / (2 * math.pi * r)
        wave[self.size // 2, self.size // 2] = self.cutoff**2 / (4 * math.pi)
        return wave / wave.sum()


def _coordinates(size: int) -> tuple[Tensor, Tensor]:
    """x, the last dimension, and y of each pixel, from -(size - 1) / 2 to (size - 1) / 2."""
    line = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return line[None].expand(size, size), line[:, None].expand(size, size)


def filtered(images: Tensor, kernels: Sequence[Hill | Sinc | None], largest: int) -> Tensor:
    """Images (B, 3, H, W), each filtered with its own kernel, where there is one.

    Borders are mirrored, or repeated where an image is no larger than half a kernel.

    By Fourier transforms, which take 7 ms for 512x512 on one core whatever the size of the kernel; a convolution takes
    7 to 45 ms for kernels of 7 to 21 pixels. Off it by 1e-6 for values in [0, 1].

    Args:
        images: float32 on any device.
        kernels: one an image, or None.
        largest: pixels a side of the largest kernel that there may be. All are laid into as many zeros, so that an
            image is computed alike whatever the kernels of others.
    """
    places = [place for place, kernel in enumerate(kernels) if kernel is not None]
    if not places:
        return images
    windows = torch.stack([_laid_into(kernel.tensor(), largest) for kernel in kernels if kernel is not None])
    blurred = _correlated(images[places], to_device(windows[:, None].float(), images.device))
    return torch.stack([blurred[places.index(k)] if k in places else image for k, image in enumerate(images)])


def _laid_into(kernel: Tensor, size: int) -> Tensor:
    return F.pad(kernel, ((size - len(kernel)) // 2,) * 4)


def _correlated(images: Tensor, windows: Tensor) -> Tensor:
    """Images (B, 3, H, W), each correlated with its window (B, 1, size, size)."""
    height, width = images.shape[-2:]
    margin = windows.shape[-1] // 2
    padded = F.pad(images, (margin,) * 4, mode="reflect" if min(height, width) > margin else "replicate")
    sides = [next_fast_len(length, real=True) for length in padded.shape[-2:]]
    # The conjugate makes it a correlation, whose window begins at the pixel: nothing that is kept wraps around.
    spectrum = torch.fft.rfft2(padded, s=sides) * torch.fft.rfft2(windows, s=sides).conj()
    return torch.fft.irfft2(spectrum, s=sides)[..., :height, :width]
