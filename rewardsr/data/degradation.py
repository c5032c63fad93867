"""Degradations that turn a high-quality image into the low-quality one a pipeline starts from.

`Light` is the mild chain of a decent camera and a decent JPEG encoder: Gaussian blur, area downsampling,
Gaussian noise, 8-bit rounding, JPEG. The embedded pipeline was trained on it. It is far milder than the
two-pass chain of Real-ESRGAN and must not be used to reproduce results of papers that train on that one.

Images are `(3, H, W)` float32 RGB in [0, 1], one at a time. Every random number comes from the generator that
the caller passes, so the same generator state gives the same image.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewardsr.data.folder import is_paired
from rewardsr.errors import UserError
from rewardsr.train.recipe import LightRecipe


@dataclass(frozen=True)
class Light:
    """Light degradation: blur, area downsampling, noise, JPEG; every pair is a range to draw from uniformly.

    `blur`: standard deviation of the Gaussian, in pixels of the high-quality image; 0 means none.
    `noise`: standard deviation of the Gaussian noise on the small image, in units of 1/255; 0 means none.
    `quality`: JPEG quality, whole numbers from 1 to 100, both ends included.
    `scale`: downsampling factor, 1 or more.
    A range whose two ends are equal is a fixed value and draws nothing.
    """

    blur: tuple[float, float] = (0.2, 1.2)
    noise: tuple[float, float] = (0.0, 4.0)
    quality: tuple[int, int] = (75, 97)
    scale: int = 4

    def __post_init__(self) -> None:
        for name, bounds in (("blur", self.blur), ("noise", self.noise), ("quality", self.quality)):
            low, high = bounds
            if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
                raise ValueError(f"{name}: expected (low, high) with 0 <= low <= high, got {bounds}")
        if any(not isinstance(q, int) or not 1 <= q <= 100 for q in self.quality):
            raise ValueError(f"quality: expected whole numbers from 1 to 100, got {self.quality}")
        if not isinstance(self.scale, int) or self.scale < 1:
            raise ValueError(f"scale: expected a whole number of at least 1, got {self.scale!r}")

    def __call__(self, hq: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade one image.

        `hq`: `(3, H, W)` float32 RGB in [0, 1], H and W multiples of `scale`.
        `generator`: a CPU generator, the only source of randomness.
        Returns `(3, H // scale, W // scale)` float32 RGB in [0, 1], every value a multiple of 1/255.
        Raises ValueError for another shape, dtype or range.
        """
        _check(hq, self.scale)
        lq = hq.detach().cpu()
        sigma = _uniform(self.blur, generator)
        if sigma > 0:
            lq = _gaussian_blur(lq, sigma)
        # Averaging whole blocks is exactly area interpolation when the size divides evenly.
        lq = F.avg_pool2d(lq[None], self.scale)[0]
        level = _uniform(self.noise, generator) / 255
        if level > 0:
            lq = lq + level * torch.randn(lq.shape, generator=generator)
        return _jpeg(lq, _whole(self.quality, generator))


def degradation_for(path: str, options: LightRecipe, scale: int) -> Light | None:
    """The built-in degradation for a folder of HQ images; None for a folder of pairs."""
    if is_paired(path):
        return None
    try:
        return Light(blur=options.blur, noise=options.noise, quality=options.quality, scale=scale)
    except ValueError as error:
        raise UserError(f"data.degradation: {error}") from error


def _check(hq: Tensor, scale: int) -> None:
    if hq.ndim != 3 or hq.shape[0] != 3:
        raise ValueError(f"hq: expected shape (3, H, W), got {tuple(hq.shape)}")
    if hq.dtype != torch.float32:
        raise ValueError(f"hq: expected float32, got {hq.dtype}")
    height, width = hq.shape[1:]
    if height == 0 or width == 0 or height % scale or width % scale:
        raise ValueError(f"hq: expected height and width to be multiples of {scale}, got {height} x {width}")
    low, high = (float(value) for value in torch.aminmax(hq))
    # Written as "not inside" so that NaN is refused too.
    if not (low >= 0 and high <= 1):
        raise ValueError(f"hq: expected values in [0, 1], got [{low:.4g}, {high:.4g}]")


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
    radius = math.ceil(3 * sigma)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum()
    # Replication, unlike reflection, works for images smaller than the kernel.
    padded = F.pad(image[:, None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def _jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    buffer.seek(0)
    with Image.open(buffer) as decoded:
        array = np.array(decoded.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255
