"""What reward hacking leaves in images, without a network: metrics that watch a run, and are its guards by default.

Too much or too little high frequency, other colours, black and blown-out pixels, and grids on the raster of the
latents. All are 0 at best and fall with the damage. Gray is BT.601 luma in full range [0, 1].
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale, rgb_to_lab
from kornia.filters import filter2d_separable
from pydantic import Field
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.options import Options
from rewardsr.rewards.detail import LEVEL, high_frequencies
from rewardsr.rewards.fidelity import target
from rewardsr.rewards.precision import computing
from rewardsr.transfer import to_device

ENDS = 2 / 255  # values this near to 0 or 1 count as dark or saturated
CELLS = 4  # a period is looked for where it fits into an image at least this often, across and down


class HighFrequency:
    """Energy of high frequencies against HQ's: -|log2((e + c) / (e_hq + c))|; 0 is best, -1 half or twice as much.

    e is the mean square of gray minus its Gaussian blur (11x11 pixels, sigma 1.5, edges replicated) over the image,
    c = (1/255)^2. It does not see where the energy is: that is what `detail` and `detail_correlation` do.
    """

    name = "high_frequency"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "detail"
    margin = 1.0

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1].

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        with computing(sr.device):
            return -(_log_energy(sr) - _log_energy(target(self.name, sr, batch))).abs()


class HighFrequencyLQ:
    """The same against LQ, for where there is no HQ: both are filtered at their own resolution.

    Photographs have about as much energy in a band at each scale (power falls with the square of the frequency), so LQ
    tells how much to expect above its own band. Single photographs are off by a factor, and so is an LQ image that is
    blurred or noisy: what counts is the difference between two pipelines on the same images.
    """

    name = "high_frequency_lq"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "detail"
    margin = 1.0

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` (B, 3, H, W) and `batch.lq` (B, 3, h, w) in [0, 1]."""
        with computing(sr.device):
            return -(_log_energy(sr) - _log_energy(batch.lq)).abs()


class ColorShift:
    """Shift of an image's mean colour against LQ's: minus the distance in CIELAB (CIE 1976); 0 is best.

    Means are taken of sRGB values, which enlarging keeps, and compared in Lab (D65), brightness included. A distance
    of about 2.3 is just noticed side by side.
    """

    name = "color_shift"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"
    margin = 2.0

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` (B, 3, H, W) and `batch.lq` (B, 3, h, w) in [0, 1]."""
        with computing(sr.device):
            ours, theirs = (rgb_to_lab(image.float().mean((2, 3), keepdim=True)) for image in (sr, batch.lq))
            return -torch.linalg.vector_norm((ours - theirs).flatten(1), dim=1)


class Clipping:
    """Dark and saturated pixels beyond LQ's: minus the shares that `sr` has more than LQ; 0 is best.

    A pixel is dark where one of its channels is 2/255 or less, saturated where one is 253/255 or more.
    """

    name = "clipping"
    differentiable = False  # it counts
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"
    margin = 0.02

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in [-2, 0]; `sr` (B, 3, H, W) and `batch.lq` (B, 3, h, w) in [0, 1]."""
        return -(_clipped(sr) - _clipped(batch.lq)).relu().sum(1)


class PeriodicPatternOptions(Options):
    """Of `PeriodicPattern`."""

    periods: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(
        (2, 4, 8, 16),
        min_length=1,
        description="in pixels: strides of the decoder, the side of a latent and of a patch of latents",
    )


class PeriodicPattern:
    """A grid or checkerboard that LQ does not have: minus its root mean square in levels of 255; 0 is best.

    A pipeline that is pushed too far draws on the raster of its latents: the same few pixels again and again, in
    sky and texture alike. For a period p, gray minus its mean over one period around each pixel is cut into cells of
    p x p, and the median over cells of each place is the pattern: exact for one that is everywhere, next to nothing for
    edges, and for textures whose period is no whole number of pixels or which fill less than half of the image. Its
    mean square counts as far as it exceeds that of the periods p - 1 and p + 1, and that of LQ, enlarged. The score is
    that of the period where the most is left.

    A period that does not fit into the image four times is left out; an image too small for all of them scores 0.
    """

    Options = PeriodicPatternOptions

    name = "periodic_pattern"
    differentiable = False  # a median hands its gradient to one pixel of a cell
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "detail"
    margin = 0.5

    def __init__(self, options: PeriodicPatternOptions) -> None:
        self._periods = options.periods

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` (B, 3, H, W) and `batch.lq` (B, 3, h, w) in [0, 1]."""
        with computing(sr.device), torch.no_grad():
            ours, theirs = (rgb_to_grayscale(image.float()) for image in (sr, batch.lq))
            scale = ours.shape[-1] / theirs.shape[-1]
            theirs = F.interpolate(theirs, size=ours.shape[-2:], mode="bicubic")
            worst = ours.new_zeros(len(ours))
            for period in self._periods:
                if (CELLS + 1) * period > min(ours.shape[-2:]):  # one is lost at the edges
                    continue
                left = _standing_out(ours, period)
                if period >= 2 * scale:  # LQ holds nothing finer than two of its pixels
                    left = left - _standing_out(theirs, period)
                worst = worst.maximum(left)
            return -255 * worst.sqrt()


def _log_energy(image: Tensor) -> Tensor:
    """log2 (B,) of the mean square of high frequencies, of RGB (B, 3, H, W) in [0, 1]."""
    return (high_frequencies(image).square().mean((1, 2, 3)) + LEVEL**2).log2()


def _clipped(image: Tensor) -> Tensor:
    """Shares (B, 2) of dark and of saturated pixels."""
    # Values that were rounded to 8 bits and divided must count, whatever the last bit of 2/255 is.
    low, high = image.amin(1) <= ENDS + 1e-6, image.amax(1) >= 1 - ENDS - 1e-6
    return torch.stack([low, high], 1).float().mean((2, 3))


def _standing_out(gray: Tensor, period: int) -> Tensor:
    """Mean square (B,) of the pattern of a period beyond that of its neighbours, of gray (B, 1, H, W)."""
    near = [_pattern(gray, other) for other in (period - 1, period + 1) if other > 1]
    return (_pattern(gray, period) - torch.stack(near).amax(0)).relu()


def _pattern(gray: Tensor, period: int) -> Tensor:
    """Mean square (B,) of what repeats in cells of `period` pixels, of gray (B, 1, H, W)."""
    half = period // 2
    kernel = torch.ones(1, 2 * half + 1) / period
    if period % 2 == 0:
        kernel[:, [0, -1]] /= 2
    kernel = to_device(kernel, gray.device)
    high, wide = ((length - 2 * half) // period for length in gray.shape[-2:])
    inner = gray[..., half : half + high * period, half : half + wide * period]
    local = filter2d_separable(gray, kernel, kernel, padding="valid")[..., : high * period, : wide * period]
    cells = (inner - local).reshape(-1, high, period, wide, period).permute(0, 2, 4, 1, 3)
    pattern = cells.flatten(3).median(3).values
    return (pattern - pattern.mean((1, 2), keepdim=True)).square().mean((1, 2))
