"""Blur kernels of the Real-ESRGAN degradation, and the blur itself.

Kernels are (size, size) float64 with sum 1. Coordinates run from -(size - 1) / 2 to (size - 1) / 2; x is the last
dimension. With q = p' S^-1 p of a point p and the covariance S = R(rotation) diag(sigma_x^2, sigma_y^2) R(rotation)':
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

Shape = Literal["gaussian", "generalized", "plateau"]
Family = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
FAMILIES: tuple[Family, ...] = get_args(Family)


def blur_kernel(family: Family, size: int, sigma: tuple[float, float], rotation: float, beta: float) -> Tensor:
    """A kernel with one hill: Gaussian exp(-q / 2), generalised exp(-q^beta / 2) or plateau 1 / (1 + q^beta).

    Args:
        family: the form of the hill, and whether it is round (iso), which takes sigma_x for both axes.
        size: pixels a side, odd.
        sigma: of the two axes in pixels, above 0.
        rotation: of the axes in radians, from x to y; of no effect on round ones.
        beta: exponent, above 0; of no effect on Gaussian ones.
    """
    x, y = _coordinates(size)
    sigma_x, sigma_y = sigma if family.endswith("aniso") else (sigma[0], sigma[0])
    along = (math.cos(rotation) * x + math.sin(rotation) * y) / sigma_x
    across = (math.cos(rotation) * y - math.sin(rotation) * x) / sigma_y
    q = along.square() + across.square()
    if family.startswith("generalized"):
        hill = torch.exp(-0.5 * q**beta)
    elif family.startswith("plateau"):
        hill = 1 / (1 + q**beta)
    else:
        hill = torch.exp(-0.5 * q)
    return hill / hill.sum()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """The circular low-pass filter: cutoff J1(cutoff r) / (2 pi r), and cutoff^2 / (4 pi) at the centre.

    Args:
        size: pixels a side, odd.
        cutoff: frequency in radians a pixel, above 0, pi at most; what oscillates faster is taken out.
    """
    x, y = _coordinates(size)
    r = torch.hypot(x, y)
    wave = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    wave[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return wave / wave.sum()


def _coordinates(size: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return line[None].expand(size, size), line[:, None].expand(size, size)


def centred(kernel: Tensor, size: int) -> Tensor:
    """A kernel in the middle of zeros, (size, size)."""
    return F.pad(kernel, ((size - len(kernel)) // 2,) * 4)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Images (B, 3, H, W), each filtered with its own of the kernels (B, size, size).

    Borders are mirrored, or repeated where an image is no larger than half a kernel.

    By Fourier transforms, which take 7 ms for 512x512 on one core whatever the size of the kernel; a convolution takes
    7 to 45 ms for kernels of 7 to 21 pixels. Off it by 1e-6 for values in [0, 1].
    """
    height, width = images.shape[-2:]
    margin = kernels.shape[-1] // 2
    padded = F.pad(images, (margin,) * 4, mode="reflect" if min(height, width) > margin else "replicate")
    sides = [next_fast_len(length, real=True) for length in padded.shape[-2:]]
    # The conjugate makes it a correlation, whose window begins at the pixel: nothing that is kept wraps around.
    waves = torch.fft.rfft2(kernels[:, None].to(images), s=sides).conj()
    return torch.fft.irfft2(torch.fft.rfft2(padded, s=sides) * waves, s=sides)[..., :height, :width]
