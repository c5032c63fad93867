"""Degradations that turn a high-quality image into the low-quality one a pipeline starts from: the plug-in group
`degradations`.

A degradation is a class that declares `Options` (a subclass of `rewardsr.Options`; none if it has no options)
and is made as `Kind(options, scale)`. What it makes is called as `(hq (3, H, W), generator) -> lq (3, H / scale,
W / scale)`, both float32 RGB in [0, 1], one image at a time, on the CPU. Every random number comes from the generator,
so the same generator state gives the same image.
"""

import inspect
import io
import math
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from rewardsr.data.images import from_pil, to_pil
from rewardsr.errors import UserError, one_line
from rewardsr.options import Options, parse
from rewardsr.plugins import resolve
from rewardsr.train.recipe import DegradationRecipe


class Degradation(Protocol):
    """Makes `lq` (3, H / scale, W / scale) from `hq` (3, H, W), both in [0, 1]."""

    def __call__(self, hq: Tensor, generator: torch.Generator, /) -> Tensor:
        """Degrade one image; every random number comes from `generator`."""
        ...


def degradation_options(section: DegradationRecipe) -> dict[str, Any]:
    """A recipe's section `data.degradation` with every option written out.

    Raises:
        UserError: unknown degradation or option, or a wrong value.
    """
    return {"name": section.name, **_options(_kind(section.name), section).model_dump(mode="json")}


def make_degradation(section: DegradationRecipe, scale: int) -> Degradation:
    """The degradation of a recipe's section `data.degradation`, tried out on an image of noise.

    Raises:
        UserError: unknown degradation or option, a wrong value, or a degradation that breaks the contract.
    """
    kind = _kind(section.name)
    options = _options(kind, section)
    if scale < 1:
        raise UserError(f"the scale is {scale}, expected 1 or more")
    hq = torch.rand((3, 32 * scale, 32 * scale), generator=torch.Generator().manual_seed(0))
    try:
        made: Degradation = kind(options, scale)
        one, other = (made(hq.clone(), torch.Generator().manual_seed(0)) for _ in range(2))
        sound = one.shape == (3, 32, 32) and one.dtype == torch.float32 and bool(((one >= 0) & (one <= 1)).all())
    except Exception as error:  # a degradation may be a stranger's
        raise UserError(f"degradation '{section.name}' fails on an image of noise: {one_line(error)}") from error
    if not sound:
        raise UserError(
            f"degradation '{section.name}' must make float32 images (3, 32, 32) in [0, 1] of {tuple(hq.shape)}, "
            f"not {one.dtype} {tuple(one.shape)} in [{one.min():.3g}, {one.max():.3g}]"
        )
    if not torch.equal(one, other):
        raise UserError(f"degradation '{section.name}' must take all randomness from its generator: two calls differ")
    return made


def _kind(name: str) -> Any:
    kind = resolve("degradations", name)
    declared = getattr(kind, "Options", Options)
    if not callable(kind) or not (inspect.isclass(declared) and issubclass(declared, Options)):
        raise UserError(
            f"degradation '{name}': expected a class that is made as Kind(options, scale) and whose Options are a "
            "subclass of rewardsr.Options"
        )
    return kind


def _options(kind: Any, section: DegradationRecipe) -> Options:
    return parse(getattr(kind, "Options", Options), section.model_extra or {}, f"data.degradation ({section.name})")


# ---- the built-in ones ----


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("expected the lower end of a range first")
    return bounds


_Sigma = Annotated[float, Field(ge=0, le=255)]  # more leaves nothing of an image
_Quality = Annotated[int, Field(ge=1, le=100)]


class LightOptions(Options):
    """Ranges to draw from uniformly, both ends included; one with equal ends is a fixed value and draws nothing."""

    blur: Annotated[tuple[_Sigma, _Sigma], AfterValidator(_ordered)] = Field(
        (0.2, 1.2), description="standard deviation of the Gaussian blur in HQ pixels; 0: none"
    )
    noise: Annotated[tuple[_Sigma, _Sigma], AfterValidator(_ordered)] = Field(
        (0.0, 4.0), description="standard deviation of the Gaussian noise on the small image in 8-bit levels; 0: none"
    )
    quality: Annotated[tuple[_Quality, _Quality], AfterValidator(_ordered)] = Field(
        (75, 97), description="JPEG quality, 1 to 100"
    )


class Light:
    """A decent camera and a decent JPEG encoder: Gaussian blur, area downsampling, Gaussian noise, 8 bits, JPEG.

    The embedded pipeline was trained on it. It is far milder than the two passes of Real-ESRGAN and must not be used to
    reproduce results of papers that train on that one.
    """

    Options = LightOptions

    def __init__(self, options: LightOptions, scale: int) -> None:
        self._options = options
        self._scale = scale

    def __call__(self, hq: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade one image.

        Args:
            hq: (3, H, W) float32 RGB in [0, 1], H and W multiples of the scale.
            generator: a CPU generator, the only source of randomness.

        Returns:
            (3, H / scale, W / scale) float32 RGB in [0, 1], every value a multiple of 1/255.

        Raises:
            ValueError: another shape, dtype or range.
        """
        _check(hq, self._scale)
        lq = hq.detach().cpu()
        sigma = _uniform(self._options.blur, generator)
        if sigma > 0:
            lq = _gaussian_blur(lq, sigma)
        # Averaging whole blocks is exactly area interpolation when the size divides evenly.
        lq = F.avg_pool2d(lq[None], self._scale)[0]
        level = _uniform(self._options.noise, generator) / 255
        if level > 0:
            lq = lq + level * torch.randn(lq.shape, generator=generator)
        return _jpeg(lq, _whole(self._options.quality, generator))


class Bicubic:
    """Bicubic downsampling with antialiasing, rounded to 8 bits; draws nothing."""

    def __init__(self, options: Options, scale: int) -> None:
        self._scale = scale

    def __call__(self, hq: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade one image; arguments, result and errors are those of `Light`."""
        _check(hq, self._scale)
        size = (hq.shape[1] // self._scale, hq.shape[2] // self._scale)
        lq = F.interpolate(hq.detach().cpu()[None], size, mode="bicubic", antialias=True)[0]
        return (lq.clamp(0, 1) * 255).round() / 255


def _check(hq: Tensor, scale: int) -> None:
    shaped = hq.ndim == 3 and len(hq) == 3 and hq.numel() > 0 and not any(side % scale for side in hq.shape[1:])
    if not shaped or hq.dtype != torch.float32 or not bool(((hq >= 0) & (hq <= 1)).all()):
        raise ValueError(
            f"hq: expected (3, H, W) float32 in [0, 1], H and W multiples of {scale}, got {tuple(hq.shape)} {hq.dtype} "
            f"in [{hq.amin() if hq.numel() else 0:.4g}, {hq.amax() if hq.numel() else 0:.4g}]"
        )


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


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """The image (3, H, W), written as JPEG and read back."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=quality)
    return from_pil(Image.open(buffer))
