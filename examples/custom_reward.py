"""A reward of your own: how natural the local contrast of an image is, compared with HQ.

rewardsr finetune ... --rewards psnr=0.5,custom_reward:Contrast=0.5     (run in the folder of this file)
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rewardsr import Batch, Options


class ContrastOptions(Options):
    window: int = 8  # pixels a side; in a recipe: {name: "custom_reward:Contrast", options: {window: 16}}


class Contrast:
    """Agreement of the standard deviation in square windows with that of HQ; 0 is perfect, less is worse."""

    Options = ContrastOptions

    name = "contrast"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    kind = "detail"

    def __init__(self, options: ContrastOptions) -> None:
        self._window = options.window

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """(B,) scores of `sr` (B, 3, H, W) in [0, 1], one an image."""
        assert batch.hq is not None
        return -(self._deviation(sr) - self._deviation(batch.hq)).abs().mean((1, 2, 3))

    def _deviation(self, image: Tensor) -> Tensor:
        gray = image.mean(1, keepdim=True)
        variance = avg_pool2d(gray.square(), self._window) - avg_pool2d(gray, self._window).square()
        return torch.sqrt(variance.clamp(min=0) + 1e-6)
