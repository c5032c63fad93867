"""Fidelity to HQ on luma: PSNR and SSIM as super-resolution papers report them.

Both agree with pyiqa's `psnr` and `ssim` under `test_y_channel=True, color_space="ycbcr"`, which OSEDiff, SeeSR and
their followers use (no crop border), and depend on nothing that is not free to use.
"""

import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards.distances import structure
from rewardsr.rewards.precision import computing


def luma(image: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of BT.601 in studio range [16, 235]/255, from RGB (B, 3, H, W) in [0, 1]."""
    return (16 + 219 * rgb_to_grayscale(image.float())) / 255


def target(name: str, sr: Tensor, batch: Batch) -> Tensor:
    """The HQ images (B, 3, H, W) that `sr` is compared with by the reward called `name`.

    Raises:
        UserError: the batch has none.
        ValueError: they have another shape than `sr`.
    """
    if batch.hq is None:
        raise UserError(f"reward '{name}' compares with HQ images, and there are none: give them, or drop the reward")
    if batch.hq.shape != sr.shape:
        raise ValueError(f"{name}: expected sr and hq of one shape, got {tuple(sr.shape)} and {tuple(batch.hq.shape)}")
    return batch.hq


class PSNR:
    """Peak signal-to-noise ratio of luma, in dB; higher is closer.

    Values stay floating point (no rounding to 8 bit). 1e-8 is added to the mean squared error, so that equal images
    score 80 dB and the gradient is finite everywhere; at 40 dB this changes the score by 0.0004 dB.
    """

    name = "psnr"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"
    margin = 1.0

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in dB, in (0, 80]; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1].

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        with computing(sr.device):
            error = luma(sr) - luma(target(self.name, sr, batch))
            return -10 * torch.log10(error.square().mean((1, 2, 3)) + 1e-8)


class SSIM:
    """Structural similarity of luma (Wang et al. 2004), in [0, 1]; higher is closer.

    An 11x11 Gaussian window of sigma 1.5, only where it fits. As in the tools behind the papers' tables, luma is first
    rounded to 8-bit levels (without it scores are up to 0.002 higher; the gradient passes through the rounding
    unchanged), and negative structure terms count as 0.
    On images of less than 11 pixels the window shrinks to the largest odd size that fits.
    """

    name = "ssim"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"
    margin = 0.05

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in [0, 1]; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1].

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        with computing(sr.device):
            return _ssim(_levels(luma(sr)), _levels(luma(target(self.name, sr, batch))))


class Structure:
    """Agreement of coarse structure: minus RFSR's distance of low-frequency bands; 0 is best.

    The band is the low-low one of three Haar transforms: means of blocks of 8x8 pixels, times 8, in each colour.
    """

    name = "structure"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1], of 8 pixels a side or more.

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        return -structure(sr, target(self.name, sr, batch))


def _levels(y: Tensor) -> Tensor:
    """`y` rounded to multiples of 1/255, with the gradient of `y`."""
    return y + ((y * 255).round() / 255 - y).detach()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean (B,) of equation 13 of Wang et al. 2004 over the windows in `x` and `y` (B, 1, H, W) in [0, 1]."""
    smallest = min(11, *x.shape[-2:])
    kernel = get_gaussian_kernel1d(smallest - (smallest + 1) % 2, 1.5, device=x.device, dtype=x.dtype)

    def local_mean(value: Tensor) -> Tensor:
        return filter2d_separable(value, kernel, kernel, padding="valid")

    # Variances do not depend on an offset, and come out of float32 more exactly for values around 0.
    x, y = x - 0.5, y - 0.5
    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = local_mean(x * x) - mean_x.square() + local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    structure = ((2 * covariance + c2) / (variances + c2)).relu()
    brightness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (brightness * structure).mean((1, 2, 3))
