"""Evaluations as tables, and images side by side as one picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from rewardsr.data.images import write_image
from rewardsr.evaluation.protocol import Comparison, Evaluation

if TYPE_CHECKING:
    from rich.table import Table

Cell = tuple[str, Tensor]
"""A caption and an image (3, H, W) in [0, 1]."""

HEADINGS = ("reward", "base", "tuned", "difference [95 % interval]", "improved")

_GAP = 4  # pixels between cells
_LINE = 14  # height of a caption, for PIL's default font
_PADDING = 2


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """The table as text, one row a reward, in the columns of `HEADINGS`."""
    return [(name, *_row(comparison)) for name, comparison in evaluation.rewards.items()]


def table(evaluation: Evaluation, title: str | None = None) -> "Table":
    """The comparison as a table for the terminal.

    A difference is green or red where its interval lies wholly above or below zero.
    """
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, caption=summary(evaluation))
    for position, heading in enumerate(HEADINGS):
        result.add_column(heading.replace("[", r"\["), justify="right" if position else "left")
    for name, comparison in evaluation.rewards.items():
        # Text, since rich would take the brackets of an interval for markup.
        cells = [Text(cell) for cell in (name, *_row(comparison))]
        cells[3].stylize(_style(comparison))
        result.add_row(*cells)
    return result


def markdown(evaluation: Evaluation) -> str:
    """The comparison as a Markdown table with the summary below it."""
    aligned = [":---", *["---:"] * (len(HEADINGS) - 1)]
    body = [[cell.replace("|", r"\|") for cell in row] for row in rows(evaluation)]
    lines = [f"| {' | '.join(row)} |" for row in (HEADINGS, aligned, *body)]
    return "\n".join([*lines, "", summary(evaluation), ""])


def text(evaluation: Evaluation) -> str:
    """The comparison as plain aligned text, for logs."""
    cells = [HEADINGS, *rows(evaluation)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join([*lines, summary(evaluation), ""])


def summary(evaluation: Evaluation) -> str:
    """What the numbers were measured on, in one line."""
    count, draws = len(evaluation.images), evaluation.draws_per_image
    return (
        f"{count} image{'s' * (count != 1)}, {draws} draw{'s' * (draws != 1)} of noise each, seed {evaluation.seed}, "
        f"colour fix {evaluation.color_fix}; higher is better; interval: paired bootstrap by image"
    )


def comparison_row(lq: Tensor, base: Tensor, tuned: Tensor, hq: Tensor | None = None, name: str = "") -> list[Cell]:
    """One row for `grid`: LQ enlarged (bicubic) | base | tuned | HQ.

    Args:
        lq: (3, h, w) in [0, 1].
        base, tuned: (3, H, W) in [0, 1].
        hq: (3, H, W) in [0, 1], where there is one.
        name: the image's name, put in front of the first caption.
    """
    enlarged = F.interpolate(lq[None], size=base.shape[-2:], mode="bicubic", antialias=True)[0].clamp(0, 1)
    cells = [(f"{name} LQ".strip(), enlarged), ("base", base), ("tuned", tuned)]
    return cells if hq is None else [*cells, ("HQ", hq)]


def grid(cells: Sequence[Sequence[Cell]], side: int | None = None) -> Tensor:
    """Images in rows and columns with a caption above each, on white.

    Args:
        cells: rows of (caption, image (3, H, W) in [0, 1]); sizes may differ.
        side: cut larger images at the centre to this many pixels a side; whole images by default.

    Returns:
        (3, H, W) float32 in [0, 1] on the CPU.

    Raises:
        ValueError: no cells, or something that is not an image.
    """
    if not any(cells):
        raise ValueError("grid: nothing to show")
    pictures = [[_centre(image, side) for _, image in row] for row in cells]
    columns = max(len(row) for row in pictures)
    widths = [max((row[c].shape[-1] for row in pictures if c < len(row)), default=0) for c in range(columns)]
    heights = [max((image.shape[-2] for image in row), default=0) for row in pictures]
    height = sum(heights) + len(heights) * (_LINE + _GAP) - _GAP
    canvas = torch.ones(3, height, sum(widths) + (columns - 1) * _GAP)
    top = 0
    for row, images, tall in zip(cells, pictures, heights, strict=True):
        left = 0
        for (caption, _), image, width in zip(row, images, widths, strict=False):
            canvas[:, top : top + _LINE, left : left + width] = _caption(caption, width)
            below = top + _LINE
            canvas[:, below : below + image.shape[-2], left : left + image.shape[-1]] = image
            left += width + _GAP
        top += _LINE + tall + _GAP
    return canvas


def write_grid(cells: Sequence[Sequence[Cell]], path: Path | str, side: int | None = None) -> Path:
    """`grid`, written as PNG in one step.

    Raises:
        UserError: the place cannot be written to.
    """
    return write_image(grid(cells, side), path)


def _row(comparison: Comparison) -> tuple[str, ...]:
    if math.isnan(comparison.low):
        interval = "[one image: none]"
    else:
        interval = f"[{_signed(comparison.low)}, {_signed(comparison.high)}]"
    return (
        _number(comparison.base_mean),
        _number(comparison.tuned_mean),
        f"{_signed(comparison.difference)} {interval}",
        f"{100 * comparison.improved:.0f} %",
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.1f}"


def _style(comparison: Comparison) -> str:
    if comparison.low > 0:
        return "green"
    return "red" if comparison.high < 0 else ""


def _centre(image: Tensor, side: int | None) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"grid: expected images (3, H, W), got {tuple(image.shape)}")
    height, width = image.shape[-2:]
    tall, wide = min(height, side or height), min(width, side or width)
    top, left = (height - tall) // 2, (width - wide) // 2
    return image.detach().float().cpu().clamp(0, 1)[:, top : top + tall, left : left + wide]


def _caption(caption: str, width: int) -> Tensor:
    """(3, _LINE, width): black on white, cut off where it is too long."""
    strip = Image.new("L", (width, _LINE), 255)
    # PIL's font of last resort knows Latin-1 only and fails on anything else.
    known = caption.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((_PADDING, 1), known, fill=0, font=ImageFont.load_default())
    return torch.from_numpy(np.array(strip)).float().expand(3, -1, -1) / 255
