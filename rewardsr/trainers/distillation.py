"""Variational score distillation, as OSEDiff and GDPO-SR have it: pure maths on latents (B, C, h, w)."""

import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-6  # of the weight that divides: latents that are the base's own have no direction to go


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
