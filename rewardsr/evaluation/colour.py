"""Colour fixes: the colours of the LQ image for what a pipeline made of it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardsr.errors import UserError

COLOR_FIXES = ("none", "adain", "wavelet")

_WAVELET_LEVELS = 5
_REACH = 2**_WAVELET_LEVELS - 1  # of the blurs together, in pixels
_BAND = 2**22  # pixels that are fixed at a time
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
    return fix_color(sr, reference, "adain")


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
    return fix_color(sr, reference, "wavelet")


def fix_color(sr: Tensor, reference: Tensor, color_fix: str) -> Tensor:
    """Apply the colour fix of this name: "none", "adain" or "wavelet".

    Raises:
        UserError: another name.
    """
    fixed = sr.clone()
    fix_color_by_rows(fixed, lambda rows: reference[..., rows, :], reference.shape[-2], color_fix)
    return fixed


def fix_color_by_rows(sr: Tensor, reference: Callable[[slice], Tensor], height: int, color_fix: str) -> None:
    """`fix_color` in place, a few rows at a time.

    Args:
        sr: (B, 3, H, W) in [0, 1]; is changed.
        reference: gives rows of the reference.
        height: of the reference; for "wavelet" that of `sr`, which is as wide, too.
        color_fix: "none", "adain" or "wavelet".

    Raises:
        UserError: another name.
    """
    _check_color_fix(color_fix)
    if color_fix == "adain":
        _adain(sr, reference, height)
    elif color_fix == "wavelet":
        _wavelet(sr, reference)


def _check_color_fix(color_fix: str) -> None:
    if color_fix not in COLOR_FIXES:
        raise UserError(f"unknown colour fix '{color_fix}': choose one of {', '.join(COLOR_FIXES)}")


def _adain(sr: Tensor, reference: Callable[[slice], Tensor], height: int) -> None:
    sr_mean, sr_std = _statistics(sr[..., rows, :] for rows in _bands(sr.shape[-2], sr.shape[-1]))
    mean, std = _statistics(reference(rows) for rows in _bands(height, sr.shape[-1]))
    for rows in _bands(sr.shape[-2], sr.shape[-1]):
        band = sr[..., rows, :]
        band.copy_(((band - sr_mean) / sr_std * std + mean).clamp_(0, 1))


def _wavelet(sr: Tensor, reference: Callable[[slice], Tensor]) -> None:
    height = sr.shape[-2]
    before = sr[..., :0, :]  # rows above the band, as they were
    for rows in _bands(height, sr.shape[-1]):
        first, last = max(0, rows.start - _REACH), min(height, rows.stop + _REACH)
        near = torch.cat([before[..., before.shape[-2] - (rows.start - first) :, :], sr[..., rows.start : last, :]], -2)
        before = near[..., : rows.stop - first, :].clone()
        fixed = near - _coarse(near) + _coarse(reference(slice(first, last)))
        sr[..., rows, :] = fixed[..., rows.start - first : rows.stop - first, :].clamp_(0, 1)


def _bands(height: int, width: int) -> list[slice]:
    step = max(4 * _REACH, _BAND // width)
    return [slice(first, min(first + step, height)) for first in range(0, height, step)]


def _statistics(bands: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, (B, 3, 1, 1), of an image that comes in parts."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for band in bands:
        more = band.shape[-2] * band.shape[-1]
        variance, middle = torch.var_mean(band, dim=(-2, -1), keepdim=True, correction=0)
        if not count:
            count, mean, squares = more, middle, variance * more
            continue
        away = middle - mean  # two parts put together, after Chan, Golub and LeVeque (1983)
        squares = squares + variance * more + away**2 * (count * more / (count + more))
        mean, count = mean + away * (more / (count + more)), count + more
    # Unbiased; a single pixel has no such variance.
    return mean, (squares / max(1, count - 1) + _EPS).sqrt()


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
