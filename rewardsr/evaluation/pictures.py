"""Images side by side as one picture."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from rewardsr.data.images import to_uint8, write_image
from rewardsr.errors import printable
from rewardsr.storage import write_bytes

Cell = tuple[str, Tensor]
"""A caption and an image (3, H, W): float32 in [0, 1], or uint8."""

_GAP = 4  # pixels between cells
_LINE = 14  # height of a caption, for PIL's default font
_PADDING = 2


def comparison_row(
    lq: Tensor, base: Tensor, tuned: Tensor, hq: Tensor | None = None, name: str = "", side: int | None = None
) -> list[Cell]:
    """One row for `grid`: LQ enlarged (bicubic) | base | tuned | HQ.

    Args:
        lq: (3, h, w) in [0, 1].
        base: (3, H, W) in [0, 1], or what `shown` made of it with the same `side`.
        tuned: (3, H, W) in [0, 1].
        hq: (3, H, W) in [0, 1], where there is one.
        name: the image's name, put in front of the first caption.
        side: see `shown`.
    """
    enlarged = F.interpolate(lq[None], size=tuned.shape[-2:], mode="bicubic", antialias=True)[0]
    images = {f"{name} LQ".strip(): enlarged, "base": base, "tuned": tuned} | ({} if hq is None else {"HQ": hq})
    return [(caption, shown(image, side)) for caption, image in images.items()]


def shown(image: Tensor, side: int | None = None) -> Tensor:
    """An image (3, H, W) as it is kept for a picture: uint8 on the CPU.

    Args:
        image: float32 in [0, 1], or uint8.
        side: cut a larger image at the centre to this many pixels a side; the whole image by default.

    Raises:
        ValueError: no image, or values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"expected an image (3, H, W), got {tuple(image.shape)}")
    height, width = image.shape[-2:]
    tall, wide = min(height, side or height), min(width, side or width)
    top, left = (height - tall) // 2, (width - wide) // 2
    part = image[:, top : top + tall, left : left + wide]
    return (part if part.dtype == torch.uint8 else to_uint8(part)).cpu()


def closeup(row: Sequence[Cell], side: int, zoom: int) -> list[Cell]:
    """A row cut to the window with the most detail in its last image, and enlarged; pixels stay squares.

    Args:
        row: captions and images of one size, the last one the one to judge by: HQ, where there is one.
        side: of the window in pixels; a smaller image stays whole.
        zoom: whole number of times that it is enlarged.

    Raises:
        ValueError: images of several sizes, or something that is not an image.
    """
    pictures = [shown(image) for _, image in row]
    if len({picture.shape for picture in pictures}) != 1:
        raise ValueError("closeup: expected images of one size")
    height, width = pictures[-1].shape[-2:]
    tall, wide = min(side, height), min(side, width)
    fine = pictures[-1].float().mean(0)
    fine = (fine - F.avg_pool2d(fine[None], 5, 1, 2, count_include_pad=False)[0]).abs()
    energy = F.avg_pool2d(fine[None], (tall, wide), 1)[0]
    top, left = divmod(int(energy.argmax()), energy.shape[-1])
    windows = [picture[:, top : top + tall, left : left + wide] for picture in pictures]
    return [
        (caption, window.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
        for (caption, _), window in zip(row, windows, strict=True)
    ]


def grid(cells: Sequence[Sequence[Cell]]) -> Tensor:
    """Images in rows and columns with a caption above each, on white.

    Args:
        cells: rows of captions and images; sizes may differ.

    Returns:
        (3, H, W) float32 in [0, 1] on the CPU.

    Raises:
        ValueError: no cells, or something that is not an image.
    """
    if not any(cells):
        raise ValueError("grid: nothing to show")
    pictures = [[shown(image) for _, image in row] for row in cells]
    columns = max(len(row) for row in pictures)
    widths = [max((row[c].shape[-1] for row in pictures if c < len(row)), default=0) for c in range(columns)]
    heights = [max((image.shape[-2] for image in row), default=0) for row in pictures]
    height = sum(heights) + len(heights) * (_LINE + _GAP) - _GAP
    canvas = torch.full((3, height, sum(widths) + (columns - 1) * _GAP), 255, dtype=torch.uint8)
    top = 0
    for row, images, tall in zip(cells, pictures, heights, strict=True):
        left = 0
        for (caption, _), image, width in zip(row, images, widths, strict=False):
            canvas[:, top : top + _LINE, left : left + width] = _caption(caption, width)
            below = top + _LINE
            canvas[:, below : below + image.shape[-2], left : left + image.shape[-1]] = image
            left += width + _GAP
        top += _LINE + tall + _GAP
    return canvas.float() / 255


def write_grid(cells: Sequence[Sequence[Cell]], path: Path | str) -> Path:
    """`grid`, written as PNG in one step.

    Raises:
        UserError: the place cannot be written to.
    """
    return write_image(grid(cells), path)


def write_cells(cells: Sequence[Sequence[Cell]], folder: Path, step: int) -> None:
    """Write the images of `comparison_row`s one by one, as lossless WebP.

    Of row 0: `0000-LQ.webp`, `0000-base.webp` and `0000-HQ.webp`, which stay the same over a run and are written once,
    and what the tuned pipeline made of it at a step, `0000-step-00000100.webp`.

    Args:
        cells: the rows.
        folder: made where it is missing.
        step: of the run.

    Raises:
        UserError: the place cannot be written to.
    """
    for place, row in enumerate(cells):
        for caption, image in row:
            label = caption.rpartition(" ")[2]
            path = folder / f"{place:04d}-{f'step-{step:08d}' if label == 'tuned' else label}.webp"
            if label == "tuned" or not path.exists():
                write_bytes(path, encode_webp(image))


def encode_webp(image: Tensor) -> bytes:
    """An image as `shown` takes it, as lossless WebP."""
    content = io.BytesIO()
    Image.fromarray(shown(image).permute(1, 2, 0).numpy()).save(content, "WEBP", lossless=True, method=2)
    return content.getvalue()


def _caption(caption: str, width: int) -> Tensor:
    """(3, _LINE, width) uint8: black on white, cut off where it is too long."""
    strip = Image.new("L", (width, _LINE), 255)
    # PIL's font of last resort knows Latin-1 only and fails on anything else.
    known = printable(caption).encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((_PADDING, 1), known, fill=0, font=ImageFont.load_default())
    return torch.from_numpy(np.array(strip)).expand(3, -1, -1)
