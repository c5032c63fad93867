"""Losses that ask of outputs how they are distributed, as pure maths.

Variational score distillation, as OSEDiff and GDPO-SR have it, asks a teacher, of latents (B, C, h, w). The energy
score (Gneiting and Raftery 2007, section 4.3) asks HQ alone, of two draws of each image: a proper scoring rule, which
is least where draws are distributed as HQ is, given LQ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-6  # of the weight that divides: latents that are the base's own have no direction to go
PATCHES = (4, 8)  # pixels a side, of images
DETAIL_PATCH, DETAIL_WEIGHT = 4, 0.2  # of what the Laplacian leaves of them
ENERGY_SMALLEST = max(*PATCHES, DETAIL_PATCH + 2)  # pixels a side that hold a patch of each kind


def vsd_gradient(z0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Where the latents are to go, negated: (fake - real) / mean |z0 - real|, the mean over each image.

    Args:
        z0: latents of outputs.
        real: what the frozen base makes of them, noised and denoised in one step under guidance.
        fake: what the score of the outputs makes of the same noisy latents.
    """
    weight = (z0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=LEAST)
    return (fake - real) / weight


def vsd_loss(z0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A scalar whose gradient in `z0` is 2 / numel times `vsd_gradient`, and whose value is the mean of its square."""
    direction = vsd_gradient(z0.detach(), real, fake)
    return F.mse_loss(z0, (z0 - direction).detach())


def energy_score(draws: Tensor, target: Tensor, patch: int, apart: float = 1.0) -> Tensor:
    """(|x - h| + |y - h|) / 2 - apart |x - y| / 2 of two draws x, y and a target h, averaged over patches; scalar.

    |.| is the root of the mean square over a patch and over channels, plus 1e-6 under the root, for a finite gradient.

    Args:
        draws: (B, 2, C, H, W).
        target: (B, C, H, W).
        patch: pixels a side; what does not fill one at the lower and the right edge is left out.
        apart: in [0, 1]; 1: the score is proper.
    """
    x, y = draws.unbind(1)
    near = (_distance(x, target, patch) + _distance(y, target, patch)) / 2
    return near - apart / 2 * _distance(x, y, patch)


def energy_loss(sr: Tensor, hq: Tensor, apart: float = 1.0) -> Tensor:
    """The energy score of images, a mean over `PATCHES`, plus `DETAIL_WEIGHT` times that of their Laplacian; scalar.

    Args:
        sr: (B, 2, 3, H, W) in [0, 1], two draws of each image, of `ENERGY_SMALLEST` pixels a side or more.
        hq: (B, 3, H, W) in [0, 1].
        apart: in [0, 1]; less than 1 is more faithful, and draws differ less.
    """
    scores = [energy_score(sr, hq, patch, apart) for patch in PATCHES]
    detail = energy_score(laplacian(sr), laplacian(hq), DETAIL_PATCH, apart)
    return torch.stack(scores).mean() + DETAIL_WEIGHT * detail


def _distance(one: Tensor, other: Tensor, patch: int) -> Tensor:
    """Root mean squares of the difference in patches, averaged over them; scalar, of two (B, C, H, W)."""
    squares = F.avg_pool2d((one - other).square().mean(1, keepdim=True), patch)
    return (squares + 1e-6).sqrt().mean()


def laplacian(image: Tensor) -> Tensor:
    """Sum of the four neighbours minus four times the pixel, (..., H - 2, W - 2) of (..., H, W)."""
    rows = image[..., :-2, 1:-1] + image[..., 2:, 1:-1]
    columns = image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return rows + columns - 4 * image[..., 1:-1, 1:-1]
