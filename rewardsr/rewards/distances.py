"""Losses between images that are no rewards: low-frequency structure and distance of styles, as RFSR has them.

RFSR (arXiv 2412.03268) calls them L_dwt_ll and L_gram-kl. Everything is one value an image, float32 whatever autocast
says: in half precision the style distance, which is below 0.02 by construction and weighted with 5e-7, would vanish.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.rewards.precision import computing

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
    # One level of one axis maps (a, b) to (a + b) / sqrt(2); `level` levels of both axes to 2^level times the mean.
    return F.avg_pool2d(image, block, ceil_mode=True, count_include_pad=False) * block


def structure(sr: Tensor, hq: Tensor, level: int = 3) -> Tensor:
    """L_dwt_ll = mean |DWT(sr)_LL - DWT(hq)_LL| (B,), of `sr` and `hq` (B, 3, H, W) in [0, 1].

    DWT is the Haar transform; the released code uses the low band of a dual-tree complex wavelet transform instead.
    """
    with computing(sr.device):
        return (haar_low(sr.float(), level) - haar_low(hq.float(), level)).abs().mean((1, 2, 3))


def gram(features: Tensor) -> Tensor:
    """Gram matrices G_ij = sum_k F_ik F_jk / (C h w) (B, C, C) of features (B, C, h, w).

    Gatys et al. 2016, equation 3, but F (C, h w) is normalised to mean 0 and variance 1 first, so that the trace is 1.
    """
    batch, channels, height, width = features.shape
    plane = F.layer_norm(features.reshape(batch, channels, height * width), (channels, height * width))
    return plane @ plane.mT / (channels * height * width)


def style_distance(features: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """L_gram-kl (B,) = sum over layers l of w_l mean |G_l(features) - G_l(target)|, `target` detached.

    Args:
        features, target: of `rewardsr.rewards.vgg.VGG19`, by layer, each (B, C, h, w).
    """
    with computing(next(iter(features.values())).device):
        return sum(
            (
                weight * (gram(features[layer].float()) - gram(target[layer].detach().float())).abs().mean((1, 2))
                for layer, weight in STYLE_WEIGHTS.items()
            ),
            torch.zeros(()),
        )
