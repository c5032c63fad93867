"""Degradations without chance and without options."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.data.degrade.parts import check_images, to_8_bits
from rewardsr.errors import UserError
from rewardsr.options import Options


class Bicubic:
    """Bicubic downsampling with antialiasing, rounded to 8 bits; draws nothing."""

    def __init__(self, options: Options, scale: int) -> None:
        self._scale = scale

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Degrade images; arguments, result and errors are those of `rewardsr.data.degrade.light.Light`."""
        check_images(hq, generators, self._scale)
        size = (hq.shape[2] // self._scale, hq.shape[3] // self._scale)
        return to_8_bits(F.interpolate(hq.detach(), size, mode="bicubic", antialias=True))


class Unchanged:
    """Leaves images as they are: for a scale of 1, where something else than size or damage is to be learnt.

    Raises:
        UserError: the scale is another.
    """

    def __init__(self, options: Options, scale: int) -> None:
        if scale != 1:
            raise UserError(
                f"degradation 'none' leaves images at their size, and the scale is {scale}: choose bicubic, light or "
                "realesrgan, or scale 1 (pairs are never degraded, whatever is chosen)"
            )

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The same images; arguments and errors are those of `rewardsr.data.degrade.light.Light`."""
        check_images(hq, generators, 1)
        return hq.detach().clone()
