"""What the built-in degradations share: ranges to draw from, the check of their arguments, 8 bits and JPEG."""

import io
from collections.abc import Sequence
from typing import Annotated

import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from rewardsr.data.images import from_pil, to_pil


def ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    """A range, if it is one."""
    if bounds[0] > bounds[1]:
        raise ValueError("expected the lower end of a range first")
    return bounds


_Level = Annotated[float, Field(ge=0, le=255)]  # more leaves nothing of an image
_Quality = Annotated[int, Field(ge=1, le=100)]

Levels = Annotated[tuple[_Level, _Level], AfterValidator(ordered)]
"""A range of standard deviations, in pixels or 8-bit levels."""

Qualities = Annotated[tuple[_Quality, _Quality], AfterValidator(ordered)]
"""A range of JPEG qualities."""


def check_images(hq: Tensor, generators: Sequence[torch.Generator], scale: int) -> None:
    """Refuse what a degradation is not for.

    Raises:
        ValueError: another shape, dtype or range, or not one generator an image.
    """
    shaped = hq.ndim == 4 and hq.shape[1] == 3 and hq.numel() > 0 and not any(side % scale for side in hq.shape[2:])
    if not shaped or hq.dtype != torch.float32 or not bool(((hq >= 0) & (hq <= 1)).all()):
        raise ValueError(
            f"hq: expected (B, 3, H, W) float32 in [0, 1], H and W multiples of {scale}, got {tuple(hq.shape)} "
            f"{hq.dtype} in [{hq.amin() if hq.numel() else 0:.4g}, {hq.amax() if hq.numel() else 0:.4g}]"
        )
    if len(generators) != len(hq):
        raise ValueError(f"generators: expected one for each of {len(hq)} images, got {len(generators)}")


def jpeg(image: Tensor, quality: int) -> Tensor:
    """The image (3, H, W), clamped, written as JPEG by libjpeg and read back, on its device.

    libjpeg because it is what photographs have been through, on every device alike; it takes 7 ms for 512x512. An
    encoder made differentiable is 1.5 levels off it, a fifth of what quality 75 itself changes in a photograph.
    """
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=quality)
    return from_pil(Image.open(buffer)).to(image.device)


def to_8_bits(image: Tensor) -> Tensor:
    """The image, clamped to [0, 1] and rounded to multiples of 1/255."""
    return (image.clamp(0, 1) * 255).round() / 255
