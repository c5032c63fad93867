"""What a degradation is, and how a recipe's section becomes one.

A degradation is a class that declares `Options` (a subclass of `rewardsr.Options`; none if it has no options)
and is made as `Kind(options, scale)`. What it makes is called as `(hq (B, 3, H, W), generators) -> lq (B, 3, H / scale,
W / scale)`, both float32 RGB in [0, 1] on the device of `hq`, with one CPU generator an image. Every random number of
an image comes from its generator, so the same generator state gives the same image, alone or among others, on any
device.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rewardsr.data.loader import one_thread
from rewardsr.errors import UserError, one_line
from rewardsr.options import Options, parse
from rewardsr.plugins import resolve
from rewardsr.train.recipe import DegradationRecipe


class Degradation(Protocol):
    """Makes `lq` (B, 3, H / scale, W / scale) of `hq` (B, 3, H, W), both in [0, 1]."""

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator], /) -> Tensor:
        """Degrade images; every random number of image b comes from `generators[b]`."""
        ...


def degradation_options(section: DegradationRecipe) -> dict[str, Any]:
    """A recipe's section `data.degradation` with every option written out.

    Raises:
        UserError: unknown degradation or option, or a wrong value.
    """
    return {"name": section.name, **_options(_kind(section.name), section).model_dump(mode="json")}


def in_words(section: DegradationRecipe) -> str:
    """A recipe's section `data.degradation` in a line: its name, and the options that are not the defaults.

    Raises:
        UserError: unknown degradation or option, or a wrong value.
    """
    changed = _options(_kind(section.name), section).model_dump(mode="json", exclude_defaults=True)
    return ", ".join([section.name, *(f"{key}={value}" for key, value in _dotted(changed))])


def _dotted(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by their dotted names, those of sections too."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", other) for inner, other in _dotted(value))
        else:
            yield key, value


def make_degradation(section: DegradationRecipe, scale: int) -> Degradation:
    """The degradation of a recipe's section `data.degradation`, tried out on images of noise.

    Raises:
        UserError: unknown degradation or option, a wrong value, a scale that it is not for, or a degradation that
            breaks the contract.
    """
    kind = _kind(section.name)
    options = _options(kind, section)
    if scale < 1:
        raise UserError(f"the scale is {scale}, expected 1 or more")
    what = f"degradation '{section.name}'"
    hq = torch.rand((2, 3, 32 * scale, 32 * scale), generator=torch.Generator().manual_seed(0))
    try:
        made: Degradation = kind(options, scale)
        with one_thread():
            both, again = (made(hq.clone(), _generators(0, 1)) for _ in range(2))
            alone = made(hq[1:].clone(), _generators(1))
        sound = both.shape == (2, 3, 32, 32) and both.dtype == torch.float32 and bool(((both >= 0) & (both <= 1)).all())
    except UserError:
        raise
    except Exception as error:  # a degradation may be a stranger's
        raise UserError(f"{what} fails on images of noise: {one_line(error)}") from error
    if not sound:
        raise UserError(
            f"{what} must make float32 images (2, 3, 32, 32) in [0, 1] of {tuple(hq.shape)}, "
            f"not {both.dtype} {tuple(both.shape)} in [{both.min():.3g}, {both.max():.3g}]"
        )
    if not torch.equal(both, again):
        raise UserError(f"{what} must take all randomness from its generators: two calls differ")
    # Rounding may differ in a batch, and rarely turns a pixel over where the image is quantised.
    if alone.shape != both[1:].shape or (alone - both[1:]).abs().mean() > 0.5 / 255:
        raise UserError(f"{what} must make each image with its own generator: alone it differs from the one in a batch")
    return made


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _kind(name: str) -> Any:
    kind = resolve("degradations", name)
    declared = getattr(kind, "Options", Options)
    if not callable(kind) or not (inspect.isclass(declared) and issubclass(declared, Options)):
        raise UserError(
            f"degradation '{name}': expected a class that is made as Kind(options, scale) and whose Options are a "
            "subclass of rewardsr.Options"
        )
    return kind


def _options(kind: Any, section: DegradationRecipe) -> Options:
    return parse(getattr(kind, "Options", Options), section.model_extra or {}, f"data.degradation ({section.name})")
