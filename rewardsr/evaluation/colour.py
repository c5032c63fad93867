"""Colour fixes: the colours of the LQ image for what a pipeline made of it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardsr.errors import UserError

COLOR_FIXES = ("none", "adain", "wavelet")

_WAVELET_LEVELS = 5
_EPS = 1e-5


def adain(sr: Tensor, reference: Tensor) -> Tensor:
    """Give each channel the mean and standard deviation that it has in the reference.

    Adaptive instance normalisation (Huang and Belongie, 2017) on pixels, as StableSR and its successors use it:
    statistics over the whole image, unbiased variance, 1e-5 added before the root.

    Args:
        sr: (B, 3, H, W) in [0, 1].
        reference: (B, 3, h, w) in [0, 1], of any size.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    return _restyled(sr, reference).clamp(0, 1)


def wavelet(sr: Tensor, reference: Tensor) -> Tensor:
    """Take the coarse colours from the reference and the details from `sr`.

    Coarse is what is left after five blurs of doubling width (the a-trous wavelet transform), as in StableSR.

    Args:
        sr: (B, 3, H, W) in [0, 1].
        reference: of the same shape.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if sr.shape != reference.shape:
        raise ValueError(f"wavelet: sr is {tuple(sr.shape)}, but the reference is {tuple(reference.shape)}")
    return (sr - _coarse(sr) + _coarse(reference)).clamp(0, 1)


def fix_color(sr: Tensor, reference: Tensor, color_fix: str) -> Tensor:
    """Apply the colour fix of this name: "none", "adain" or "wavelet".

    Raises:
        UserError: another name.
    """
    _check_color_fix(color_fix)
    if color_fix == "none":
        return sr
    return (adain if color_fix == "adain" else wavelet)(sr, reference)


def _check_color_fix(color_fix: str) -> None:
    if color_fix not in COLOR_FIXES:
        raise UserError(f"unknown colour fix '{color_fix}': choose one of {', '.join(COLOR_FIXES)}")


def _restyled(sr: Tensor, reference: Tensor) -> Tensor:
    (sr_mean, sr_std), (mean, std) = _statistics(sr), _statistics(reference)
    return (sr - sr_mean) / sr_std * std + mean


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, (B, 3, 1, 1)."""
    unbiased = int(image.shape[-2] * image.shape[-1] > 1)  # a single pixel has no unbiased variance
    variance, mean = torch.var_mean(image, dim=(-2, -1), keepdim=True, correction=unbiased)
    return mean, (variance + _EPS).sqrt()


def _coarse(image: Tensor) -> Tensor:
    for level in range(_WAVELET_LEVELS):
        image = _blur(image, 2**level)
    return image


def _blur(image: Tensor, distance: int) -> Tensor:
    """Weights 1/4, 1/2, 1/4 at this distance in both directions, borders replicated."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (distance,) * 4, mode="replicate")
    rows = padded[..., :height, :] + 2 * padded[..., distance : distance + height, :] + padded[..., 2 * distance :, :]
    return (rows[..., :width] + 2 * rows[..., distance : distance + width] + rows[..., 2 * distance :]) / 16
