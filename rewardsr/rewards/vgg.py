"""VGG19 features for style distances: torchvision's network and weights, or a file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import make_layers

from rewardsr.rewards.precision import computing
from rewardsr.rewards.pretrained import Checkpoint, from_url, local_file

GROUPS = (2, 2, 4, 4, 4)  # convolutions of VGG19 between its poolings
LAYERS = {2: "conv1_2", 7: "conv2_2", 16: "conv3_4", 25: "conv4_4", 34: "conv5_4"}  # by their places in torchvision's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights expect
CLASSIFIER = re.compile(r"classifier\.")  # not used here
OWNER, URL = "VGG19", VGG19_Weights.IMAGENET1K_V1.url
INSTEAD = "give trainer_options.vgg=FILE, or switch the style term off with trainer_options.kl_weight=0"


class VGG19(nn.Module):
    """The last convolution of each of the five groups, before its ReLU.

    Args:
        weights: torchvision's file (`vgg19-dcbb9e9d.pth`) or the same tensors in safetensors, of any width; None takes
            torchvision's own, from its cache or the network.

    Raises:
        UserError: weights that cannot be had, read or fitted.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | str | None = None) -> None:
        super().__init__()
        path = from_url(OWNER, URL, INSTEAD) if weights is None else local_file(OWNER, weights)
        self.features = convolutions(Checkpoint(OWNER, path, CLASSIFIER), GROUPS)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features (B, C, h, w) by layer, of images (B, 3, H, W) in [0, 1] of at least 16 pixels a side."""
        found: dict[str, Tensor] = {}
        with computing(image.device, "tf32"):
            x = (image.float() - self.mean) / self.std
            for place, module in enumerate(self.features[: max(LAYERS) + 1]):
                x = module(x)
                if place in LAYERS:
                    found[LAYERS[place]] = x
        return found


def convolutions(checkpoint: Checkpoint, groups: Sequence[int]) -> nn.Sequential:
    """The convolutional part of a VGG for tensors `features.N.weight`, whose shapes say how wide it is.

    Args:
        checkpoint: torchvision's.
        groups: convolutions between its poolings.

    Raises:
        UserError: the tensors are not those of such a network.
    """
    kernels = {name: value for name, value in checkpoint.state.items() if name.endswith(".weight")}
    named = all(re.fullmatch(r"features\.\d+\.weight", name) for name in kernels)
    if not named or len(kernels) != sum(groups) or any(kernel.ndim != 4 for kernel in kernels.values()):
        raise checkpoint.unfit(f"expected VGG{sum(groups) + 3}'s {sum(groups)} convolutions features.N.weight")
    widths = iter([len(kernels[name]) for name in sorted(kernels, key=lambda name: int(name.split(".")[1]))])
    plan: list[Any] = [entry for group in groups for entry in (*(next(widths) for _ in range(group)), "M")]
    with torch.device("meta"):  # without storage, and without draws for weights that are replaced anyway
        layers: nn.Sequential = make_layers(plan)
    for module in layers:
        if isinstance(module, nn.ReLU):
            module.inplace = False  # the features are taken before it
    return checkpoint.fit(layers, "features.{}".format)
