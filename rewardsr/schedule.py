"""What a network's prediction means: diffusion and flow matching behind one interface.

Both noise latents as z_t = alpha(t) z0 + sigma(t) e. `VP` (variance-preserving diffusion): alpha = sqrt(a_t), sigma =
sqrt(1 - a_t). `Flow` (flow matching): alpha = 1 - t, sigma = t. A prediction is what the network itself gives; only
its schedule knows whether that is noise or a velocity.

Latents are (B, C, h, w) float32. A time `t` is (B,), or one number for all rows, in the schedule's own unit. Everything
is computed in the dtype of the latents, with coefficients in float32 as the original implementations have them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rewardsr.transfer import to_device

Time = Tensor | float  # (B,), or a number for all rows
Coefficient = Tensor | float  # (B, 1, 1, 1), or a number for all rows

PREDICTIONS = ("epsilon", "v_prediction")


class Schedule(ABC):
    """How latents are noised, and how predictions are read.

    Attributes:
        dtype: of times in a tensor.
        end: what a sampler's last step goes to instead of a time: z0.
        last: the time of the most noise.
    """

    dtype: ClassVar[torch.dtype]
    end: ClassVar[float]
    last: float

    @abstractmethod
    def coefficients(self, t: Time, like: Tensor) -> tuple[Coefficient, Coefficient]:
        """alpha and sigma at `t`, to be multiplied with `like` (B, C, h, w); 1 and 0 at `end`."""

    @abstractmethod
    def x0(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """z0 as the prediction has it: one denoising step to the end."""

    @abstractmethod
    def eps(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """The noise in `z_t` as the prediction has it."""

    @abstractmethod
    def target(self, z0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """What a perfect network would say at `t` of z0 and this noise, whatever the latents were noised to."""

    @abstractmethod
    def target_from(self, z_t: Tensor, z0: Tensor, t: Time) -> Tensor:
        """What a network would have to say at `t` of `z_t` so that `x0` gives z0."""

    def add_noise(self, z0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """z_t = alpha z0 + sigma e (DDPM, eq. 4; rectified flow, eq. 1)."""
        alpha, sigma = self.coefficients(t, z0)
        return alpha * z0 + sigma * noise

    def transition(
        self, z_t: Tensor, prediction: Tensor, t: Time, t_next: Time, eta: float = 0.0
    ) -> tuple[Tensor, Coefficient]:
        """One step of a sampler, as the Gaussian that the next latents are drawn from.

        std = eta sigma'/sigma sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2), mean = alpha' z0 + sqrt(sigma'^2 - std^2) e
        (DDIM, eq. 12 and 16, written in alpha and sigma). For flow with eta 0 that is Euler's step.

        Args:
            z_t: (B, C, h, w).
            prediction: of the network on `z_t` at `t`.
            t, t_next: times, the next one less noisy; `end` goes to z0.
            eta: 0 is deterministic, 1 is ancestral sampling (DDPM, eq. 6 and 7).

        Returns:
            mean (B, C, h, w) and standard deviation, 0 where the step is deterministic.
        """
        z0 = self.x0(z_t, prediction, t)
        alpha, sigma = self.coefficients(t, z_t)
        alpha_next, sigma_next = self.coefficients(t_next, z_t)
        if isinstance(sigma_next, float) and sigma_next == 0:
            return z0, 0.0
        std = eta * sigma_next / sigma * _root(sigma**2 - (alpha / alpha_next * sigma_next) ** 2) if eta else 0.0
        return alpha_next * z0 + _root(sigma_next**2 - std**2) * self.eps(z_t, prediction, t), std

    def times(self, values: Sequence[float], device: torch.device | str | None = None) -> Tensor:
        """Times as a tensor, in the schedule's dtype."""
        made = torch.tensor(values, dtype=self.dtype)
        return made if device is None else to_device(made, device)


class VP(Schedule):
    """Variance-preserving diffusion (DDPM), times int64 in [0, T).

    Args:
        alphas_cumprod: (T,) float32, a_t.
        prediction: "epsilon" (the noise), or "v_prediction" (progressive distillation, appendix D).
    """

    dtype = torch.int64
    end = -1

    def __init__(
        self, alphas_cumprod: Tensor, prediction: Literal["epsilon", "v_prediction"] | str = "epsilon"
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is '{prediction}', expected {' or '.join(PREDICTIONS)}")
        self._alphas = {torch.device("cpu"): alphas_cumprod.detach().float().cpu()}
        self._velocity = prediction == "v_prediction"
        self.last = len(alphas_cumprod) - 1

    def __repr__(self) -> str:
        return f"VP({self.last + 1} times, {PREDICTIONS[self._velocity]})"

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32 on the CPU."""
        return self._alphas[torch.device("cpu")]

    def coefficients(self, t: Time, like: Tensor) -> tuple[Coefficient, Coefficient]:
        """sqrt(a_t) and sqrt(1 - a_t), rounded in float32."""
        if isinstance(t, Tensor):
            if like.device not in self._alphas:
                self._alphas[like.device] = to_device(self.alphas_cumprod, like.device)
            a = self._alphas[like.device][t].reshape(-1, *[1] * (like.ndim - 1))
            return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)
        if t < 0:
            return 1.0, 0.0
        a = self.alphas_cumprod[int(t)]
        return float(a.sqrt()), float((1 - a).sqrt())

    def x0(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """(z_t - sigma e) / alpha (DDPM, eq. 15), or alpha z_t - sigma v."""
        alpha, sigma = self.coefficients(t, z_t)
        return alpha * z_t - sigma * prediction if self._velocity else (z_t - sigma * prediction) / alpha

    def eps(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """The prediction itself, or alpha v + sigma z_t."""
        if not self._velocity:
            return prediction
        alpha, sigma = self.coefficients(t, z_t)
        return alpha * prediction + sigma * z_t

    def target(self, z0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """The noise, or v = alpha e - sigma z0."""
        if not self._velocity:
            return noise
        alpha, sigma = self.coefficients(t, z0)
        return alpha * noise - sigma * z0

    def target_from(self, z_t: Tensor, z0: Tensor, t: Time) -> Tensor:
        """(z_t - alpha z0) / sigma, or (alpha z_t - z0) / sigma."""
        alpha, sigma = self.coefficients(t, z_t)
        return (alpha * z_t - z0) / sigma if self._velocity else (z_t - alpha * z0) / sigma


class Flow(Schedule):
    """Flow matching (rectified flow, arXiv 2209.03003): times float32 in (0, 1], 1 is noise; predictions are e - z0.

    Nothing here divides by 1 - t: at t = 1, where every flow sampler begins, the prediction still gives z0.
    """

    dtype = torch.float32
    end = 0.0
    last = 1.0

    def __repr__(self) -> str:
        return "Flow()"

    def coefficients(self, t: Time, like: Tensor) -> tuple[Coefficient, Coefficient]:
        """1 - t and t."""
        if isinstance(t, Tensor):
            t = t.to(like).reshape(-1, *[1] * (like.ndim - 1))
        return 1 - t, t

    def x0(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """z_t - t v."""
        return z_t - self.coefficients(t, z_t)[1] * prediction

    def eps(self, z_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """z_t + (1 - t) v."""
        return z_t + self.coefficients(t, z_t)[0] * prediction

    def target(self, z0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """v = e - z0, at every time."""
        return noise - z0

    def target_from(self, z_t: Tensor, z0: Tensor, t: Time) -> Tensor:
        """(z_t - z0) / t."""
        return (z_t - z0) / self.coefficients(t, z_t)[1]


def fewer(times: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` of the times, evenly spread, first and last among them."""
    if count >= len(times):
        return times
    places = torch.linspace(0, len(times) - 1, count).round().long() if count > 1 else torch.tensor([0])
    return tuple(times[int(place)] for place in places)


def shifted(t: Time, shift: float) -> Time:
    """shift t / (1 + (shift - 1) t): flow times moved towards noise (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _root(square: Coefficient) -> Coefficient:
    """Square root of what is 0 or more but for rounding."""
    return square.clamp(min=0).sqrt() if isinstance(square, Tensor) else math.sqrt(max(square, 0.0))
