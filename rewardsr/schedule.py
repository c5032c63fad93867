"""Diffusion arithmetic as pure functions of `alphas_cumprod` (a_t below).

Latents are (B, C, h, w); `t` is (B,) int64 in [0, T), or an int for all rows. Everything is computed in the dtype of
the latents, with a_t in float32 as the original implementations have it.
"""

import torch
from torch import Tensor


def add_noise(z0: Tensor, noise: Tensor, t: Tensor | int, alphas: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z0 + sqrt(1 - a_t) noise (DDPM, eq. 4)."""
    signal, sigma = _roots(t, alphas, z0)
    return signal * z0 + sigma * noise


def x0_from_eps(z_t: Tensor, eps: Tensor, t: Tensor | int, alphas: Tensor) -> Tensor:
    """z0 = (z_t - sqrt(1 - a_t) eps) / sqrt(a_t): one denoising step to the end."""
    signal, sigma = _roots(t, alphas, z_t)
    return (z_t - sigma * eps) / signal


def eps_from_x0(z_t: Tensor, z0: Tensor, t: Tensor | int, alphas: Tensor) -> Tensor:
    """eps = (z_t - sqrt(a_t) z0) / sqrt(1 - a_t): what a network must predict at t to give z0."""
    signal, sigma = _roots(t, alphas, z_t)
    return (z_t - signal * z0) / sigma


def eps_from_v(z_t: Tensor, v: Tensor, t: Tensor | int, alphas: Tensor) -> Tensor:
    """eps = sqrt(a_t) v + sqrt(1 - a_t) z_t (progressive distillation, appendix D)."""
    signal, sigma = _roots(t, alphas, z_t)
    return signal * v + sigma * z_t


def ddim_step(z_t: Tensor, eps: Tensor, t: int, t_next: int, alphas: Tensor) -> Tensor:
    """One deterministic DDIM step (eq. 12, eta 0) from t to t_next; t_next < 0 means all the way to z0."""
    z0 = x0_from_eps(z_t, eps, t, alphas)
    return z0 if t_next < 0 else add_noise(z0, eps, t_next, alphas)


def ddpm_step(z_t: Tensor, eps: Tensor, t: int, t_next: int, alphas: Tensor, noise: Tensor | None) -> Tensor:
    """One ancestral DDPM step (eq. 6 and 7, the posterior's variance) from t to t_next; t_next < 0 gives z0.

    Args:
        z_t: (B, C, h, w).
        eps: predicted noise.
        t, t_next: times, t_next < t; they need not be neighbours.
        alphas: (T,).
        noise: N(0, 1) of the shape of z_t; unused where t_next < 0.
    """
    z0 = x0_from_eps(z_t, eps, t, alphas)
    if t_next < 0:
        return z0
    if noise is None:
        raise ValueError("ddpm_step: needs noise before the last step")
    a, a_next = (alphas[time].to(z_t) for time in (t, t_next))
    beta = 1 - a / a_next
    mean = a_next.sqrt() * beta / (1 - a) * z0 + (a / a_next).sqrt() * (1 - a_next) / (1 - a) * z_t
    return mean + ((1 - a_next) / (1 - a) * beta).clamp(min=1e-20).sqrt() * noise


def fewer(times: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` of the times, evenly spread, first and last among them."""
    if count >= len(times):
        return times
    places = torch.linspace(0, len(times) - 1, count).round().long() if count > 1 else torch.tensor([0])
    return tuple(times[int(place)] for place in places)


def _roots(t: Tensor | int, alphas: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), shaped to broadcast over `like`."""
    a = alphas.to(like.device)[t].to(torch.float32).reshape(-1, *[1] * (like.ndim - 1))
    return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)
