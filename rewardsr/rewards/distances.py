"""Losses between images that are no rewards: low-frequency structure, distance of styles (RFSR, arXiv 2412.03268).

Everything is one value an image, float32 whatever autocast says: in half precision the style distance, which is below
0.02 by construction and weighted with 5e-7, would vanish.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights of VGG19's layers in the style distance, by the name of the convolution.
STYLE_WEIGHTS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}


def haar_low(image: Tensor, level: int) -> Tensor:
    """Low-low band of the orthonormal Haar transform: block means times 2^level.

    Args:
        image: (B, C, H, W).
        level: how many times the image is halved.

    Returns:
        (B, C, ceil(H / 2^level), ceil(W / 2^level)); where the blocks do not fit, the last ones are means of what is
        left of them.
    """
    block = 2**level
    return F.avg_pool2d(image, block, ceil_mode=True, count_include_pad=False) * block


def structure(sr: Tensor, hq: Tensor, level: int = 3) -> Tensor:
    """Mean absolute difference (B,) of the Haar low bands of `sr` and `hq`, both (B, 3, H, W) in [0, 1].

    The paper's "DWT"; its released code uses the low band of a dual-tree complex wavelet transform instead.
    """
    with torch.autocast(sr.device.type, enabled=False):
        return (haar_low(sr.float(), level) - haar_low(hq.float(), level)).abs().mean((1, 2, 3))


def gram(features: Tensor) -> Tensor:
    """Gram matrices (B, C, C) of features (B, C, h, w), which are normalised over their whole (C, h w) plane first.

    Divided by C h w, so that the trace is 1.
    """
    batch, channels, height, width = features.shape
    plane = F.layer_norm(features.reshape(batch, channels, height * width), (channels, height * width))
    return plane @ plane.mT / (channels * height * width)


def style_distance(features: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Gram-KL of RFSR (B,): weighted mean absolute differences of Gram matrices, `target` detached.

    Args:
        features, target: of `rewardsr.rewards.vgg.VGG19`, by layer, each (B, C, h, w).
    """
    with torch.autocast(next(iter(features.values())).device.type, enabled=False):
        return sum(
            (
                weight * (gram(features[layer].float()) - gram(target[layer].detach().float())).abs().mean((1, 2))
                for layer, weight in STYLE_WEIGHTS.items()
            ),
            torch.zeros(()),
        )
