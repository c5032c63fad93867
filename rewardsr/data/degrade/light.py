"""The mild degradation that the embedded pipeline was trained on."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewardsr.data.degrade.parts import Levels, Qualities, check_images, jpeg
from rewardsr.options import Options


class LightOptions(Options):
    """Ranges to draw from uniformly, both ends included; one with equal ends is a fixed value and draws nothing."""

    blur: Levels = Field((0.2, 1.2), description="standard deviation of the Gaussian blur in HQ pixels; 0: none")
    noise: Levels = Field(
        (0.0, 4.0), description="standard deviation of the Gaussian noise on the small image in 8-bit levels; 0: none"
    )
    quality: Qualities = Field((75, 97), description="JPEG quality, 1 to 100")


class Light:
    """A decent camera and a decent JPEG encoder: Gaussian blur, area downsampling, Gaussian noise, 8 bits, JPEG.

    It is far milder than the two passes of Real-ESRGAN and must not be used to reproduce results of papers that train
    on that one.
    """

    Options = LightOptions

    def __init__(self, options: LightOptions, scale: int) -> None:
        self._options = options
        self._scale = scale

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Degrade images.

        Args:
            hq: (B, 3, H, W) float32 RGB in [0, 1], H and W multiples of the scale.
            generators: CPU generators, one an image, the only sources of randomness.

        Returns:
            (B, 3, H / scale, W / scale) float32 RGB in [0, 1], every value a multiple of 1/255.

        Raises:
            ValueError: another shape, dtype or range, or another number of generators.
        """
        check_images(hq, generators, self._scale)
        return torch.stack([self._one(image, own) for image, own in zip(hq.detach(), generators, strict=True)])

    def _one(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        sigma = _uniform(self._options.blur, generator)
        if sigma > 0:
            lq = _gaussian_blur(lq, sigma)
        # Averaging whole blocks is exactly area interpolation when the size divides evenly.
        lq = F.avg_pool2d(lq[None], self._scale)[0]
        level = _uniform(self._options.noise, generator) / 255
        if level > 0:
            lq = lq + level * torch.randn(lq.shape, generator=generator).to(lq.device)
        return jpeg(lq, _whole(self._options.quality, generator))


def _uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    if low == high:
        return low
    return low + (high - low) * float(torch.rand((), generator=generator))


def _whole(bounds: tuple[int, int], generator: torch.Generator) -> int:
    low, high = bounds
    if low == high:
        return low
    return int(torch.randint(low, high + 1, (), generator=generator))


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blurred image (3, H, W), of an image (3, H, W)."""
    radius = math.ceil(3 * sigma)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum()
    weights: list[float] = kernel.tolist()
    # Replication, unlike reflection, works for images smaller than the kernel.
    padded = F.pad(image[None], (radius,) * 4, mode="replicate")[0]  # (3, H + 2 radius, W + 2 radius)
    height, width = image.shape[-2:]
    # Sums of shifted images: thirty times as fast as a convolution of one channel.
    rows = padded[..., :width] * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        rows.add_(padded[..., place : place + width], alpha=weight)
    blurred = rows[:, :height] * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        blurred.add_(rows[:, place : place + height], alpha=weight)
    return blurred
