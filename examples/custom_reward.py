"""A reward of your own: how natural the local contrast of an image is, compared with HQ.

rewardsr finetune ... --rewards psnr=0.5,custom_reward:Contrast=0.5     (run in the folder of this file)
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rewardsr import Batch


class Contrast:
    """Agreement of the standard deviation in 8 x 8 windows with that of HQ; 0 is perfect, less is worse."""

    name = "contrast"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    kind = "detail"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """(B,) scores of `sr` (B, 3, H, W) in [0, 1], one an image."""
        assert batch.hq is not None
        difference = self._deviation(sr) - self._deviation(batch.hq)
        return -difference.abs().mean((1, 2, 3))

    def _deviation(self, image: Tensor) -> Tensor:
        gray = image.mean(1, keepdim=True)
        variance = avg_pool2d(gray.square(), 8) - avg_pool2d(gray, 8).square()
        return torch.sqrt(variance.clamp(min=0) + 1e-6)
