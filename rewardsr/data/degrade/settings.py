"""Options of the Real-ESRGAN degradation; the defaults are the numbers that GDPO-SR trains with."""

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rewardsr.data.degrade.kernels import FAMILIES, Family
from rewardsr.data.degrade.parts import Levels, Qualities, ordered
from rewardsr.options import Options

Mode = Literal["area", "bilinear", "bicubic"]


def _odd(sizes: tuple[int, int]) -> tuple[int, int]:
    if not all(size % 2 for size in sizes):
        raise ValueError("expected odd sizes, which have a pixel in the middle")
    return sizes


def _around_1(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] <= 1 <= bounds[1]:
        raise ValueError("expected a range around 1: half of the draws are from below and half from above")
    return bounds


_Size = Annotated[int, Field(ge=3, le=63)]
_Sigma = Annotated[float, Field(ge=0.01, le=100)]
_Beta = Annotated[float, Field(ge=0.05, le=20)]
_Betas = Annotated[tuple[_Beta, _Beta], AfterValidator(ordered), AfterValidator(_around_1)]
_Cutoff = Annotated[float, Field(ge=0.05, le=math.pi)]
_Cutoffs = Annotated[tuple[_Cutoff, _Cutoff], AfterValidator(ordered)]
_Angle = Annotated[float, Field(ge=-math.pi, le=math.pi)]
_Growth = Annotated[float, Field(ge=1, le=4)]
_Shrinkage = Annotated[float, Field(ge=0.05, le=1)]
_Strength = Annotated[float, Field(ge=0, le=10)]

_Blur = Annotated[float, Field(ge=0, le=1, description="probability of the blur")]
_Sigmas = Annotated[
    tuple[_Sigma, _Sigma], AfterValidator(ordered), Field(description="standard deviation of an axis in pixels")
]
_Up = Annotated[float, Field(ge=0, le=1, description="probability to enlarge; the size is kept where neither is drawn")]
_Down = Annotated[float, Field(ge=0, le=1, description="probability to make smaller")]
_UpFactors = Annotated[tuple[_Growth, _Growth], AfterValidator(ordered), Field(description="by how much")]
_DownFactors = Annotated[tuple[_Shrinkage, _Shrinkage], AfterValidator(ordered), Field(description="by how much")]
_GaussianShare = Annotated[float, Field(ge=0, le=1, description="probability that noise is Gaussian; else Poisson")]
_Noise = Annotated[Levels, Field(description="standard deviation of Gaussian noise in 8-bit levels")]
_Poisson = Annotated[tuple[_Strength, _Strength], AfterValidator(ordered), Field(description="factor on Poisson noise")]
_Gray = Annotated[float, Field(ge=0, le=1, description="probability that noise is the same in all channels")]
_Quality = Annotated[Qualities, Field(description="JPEG quality, 1 to 100")]


class Families(Options):
    """Shares of the blur kernels' forms; they add up to 1."""

    iso: float = Field(0.45, ge=0, le=1, description="share of round Gaussians")
    aniso: float = Field(0.25, ge=0, le=1, description="share of stretched Gaussians")
    generalized_iso: float = Field(0.12, ge=0, le=1, description="share of round generalised Gaussians")
    generalized_aniso: float = Field(0.03, ge=0, le=1, description="share of stretched generalised Gaussians")
    plateau_iso: float = Field(0.12, ge=0, le=1, description="share of round plateaus")
    plateau_aniso: float = Field(0.03, ge=0, le=1, description="share of stretched plateaus")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.shares().values()) - 1) > 1e-6:
            raise ValueError(f"the shares of the kernels' families add up to {sum(self.shares().values()):.4g}, not 1")
        return self

    def shares(self) -> dict[Family, float]:
        """By family."""
        return {family: getattr(self, family) for family in FAMILIES}


class KernelOptions(Options):
    """Blur kernels of both passes, their widths aside."""

    size: Annotated[tuple[_Size, _Size], AfterValidator(ordered), AfterValidator(_odd)] = Field(
        (7, 21), description="pixels a side, odd"
    )
    sinc: float = Field(0.1, ge=0, le=1, description="probability of a sinc low-pass filter instead of a family")
    sinc_cutoff: _Cutoffs = Field((math.pi / 3, math.pi), description="of sinc filters in radians a pixel")
    large: int = Field(13, ge=3, le=65, description="from this size on, sinc filters have cutoffs of their own:")
    large_sinc_cutoff: _Cutoffs = Field((math.pi / 5, math.pi), description="in radians a pixel")
    family: Families = Families()
    rotation: Annotated[tuple[_Angle, _Angle], AfterValidator(ordered)] = Field(
        (-math.pi, math.pi), description="of the axes in radians"
    )
    generalized_beta: _Betas = Field((0.5, 4.0), description="exponent of generalised Gaussian kernels")
    plateau_beta: _Betas = Field((1.0, 2.0), description="exponent of plateau kernels")


class PassOptions(Options):
    """One pass: blur, resize, noise, JPEG. The defaults are those of the first, whose sizes are relative to HQ."""

    blur: _Blur = 1.0
    sigma: _Sigmas = (0.2, 3.0)
    up: _Up = 0.2
    up_factor: _UpFactors = (1.0, 1.5)
    down: _Down = 0.7
    down_factor: _DownFactors = (0.3, 1.0)
    gaussian: _GaussianShare = 0.5
    noise: _Noise = (1.0, 15.0)
    poisson: _Poisson = (0.05, 2.0)
    gray: _Gray = 0.4
    quality: _Quality = (60, 95)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.up + self.down > 1 + 1e-6:
            raise ValueError(f"up and down, which are probabilities, add up to {self.up + self.down:.4g}: more than 1")
        return self


class SecondPassOptions(PassOptions):
    """The second pass, whose sizes are relative to LQ, and how it ends: resize to LQ, sinc filter, and JPEG before or
    after these two."""

    blur: _Blur = 0.5
    sigma: _Sigmas = (0.2, 1.5)
    up: _Up = 0.3
    up_factor: _UpFactors = (1.0, 1.2)
    down: _Down = 0.4
    down_factor: _DownFactors = (0.6, 1.0)
    noise: _Noise = (1.0, 12.0)
    poisson: _Poisson = (0.05, 1.0)
    quality: _Quality = (60, 100)
    sinc: float = Field(0.8, ge=0, le=1, description="probability of the sinc filter")
    sinc_cutoff: _Cutoffs = Field((math.pi / 3, math.pi), description="of it in radians a pixel")
    jpeg_last: float = Field(0.5, ge=0, le=1, description="probability that JPEG comes after resize and sinc filter")


class RealESRGANOptions(Options):
    """Ranges to draw from uniformly, both ends included, and probabilities."""

    kernel: KernelOptions = KernelOptions()
    first: PassOptions = PassOptions()
    second: SecondPassOptions = SecondPassOptions()
    modes: tuple[Mode, ...] = Field(
        ("area", "bilinear", "bicubic"), min_length=1, description="of resizing, without antialiasing; one is drawn"
    )
