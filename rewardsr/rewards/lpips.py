"""LPIPS, the perceptual distance of Zhang et al. (arXiv 1801.03924), version 0.1 on VGG16: a loss, not a reward."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights

from rewardsr.rewards.precision import computing
from rewardsr.rewards.pretrained import Checkpoint, from_hub, from_url, local_file
from rewardsr.rewards.vgg import CLASSIFIER, convolutions

GROUPS = (2, 2, 3, 3, 3)  # convolutions of VGG16 between its poolings
LAYERS = (3, 8, 15, 22, 29)  # the last ReLU of each, by their places in torchvision's
# Of ImageNet's mean and deviation, for images in [-1, 1], as its authors round them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10
REPOSITORY, FILE = "chaofengc/IQA-PyTorch-Weights", "LPIPS_v0.1_vgg-a78928a0.pth"  # the authors' weights, a mirror
HEAD = re.compile(r"lin(\d)\.(?:model\.1\.|model\.)?weight")
OTHERS = re.compile(r"(?!lin\d\.)")  # some files hold more than the heads
OWNER = "LPIPS"
SMALLEST = 16  # pixels that VGG16 halves four times


class LPIPS(nn.Module):
    """The distance: squared differences of unit-normalised features, weighted by channel, averaged over places.

    Args:
        vgg: torchvision's VGG16 (`vgg16-397923af.pth`) or the same tensors in safetensors, of any width; None takes
            torchvision's own, from its cache or the network.
        heads: the five layers of channel weights (`lin0` to `lin4`), as LPIPS's authors publish them (`vgg.pth`); None
            takes them from the Hub or its cache.
        instead: what the user may do without them, for messages.

    Raises:
        UserError: weights that cannot be had, read or fitted.
    """

    def __init__(self, vgg: Path | str | None, heads: Path | str | None, instead: str) -> None:
        super().__init__()
        path = from_url(OWNER, VGG16_Weights.IMAGENET1K_V1.url, instead) if vgg is None else local_file(OWNER, vgg)
        self.features = convolutions(Checkpoint(OWNER, path, CLASSIFIER), GROUPS)
        path = from_hub(OWNER, REPOSITORY, FILE, instead) if heads is None else local_file(OWNER, heads)
        weights = _heads(
            Checkpoint(OWNER, path, OTHERS),
            [len(self.features.get_parameter(f"{place - 1}.weight")) for place in LAYERS],
        )
        for number, weight in enumerate(weights):
            self.register_buffer(f"head{number}", weight)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, sr: Tensor, hq: Tensor) -> Tensor:
        """Distances (B,), 0 for equal images; gradients reach `sr`.

        Args:
            sr, hq: (B, 3, H, W) in [0, 1], of at least 16 pixels a side.
        """
        with computing(sr.device, "tf32"):
            with torch.no_grad():
                target = self._features(hq)
            total = torch.zeros(len(sr), device=sr.device)
            for number, (ours, theirs) in enumerate(zip(self._features(sr), target, strict=True)):
                total = total + ((ours - theirs).square() * getattr(self, f"head{number}")).sum(1).mean((1, 2))
            return total

    def _features(self, image: Tensor) -> list[Tensor]:
        x = ((image.float() * 2 - 1) - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for place, module in enumerate(self.features[: LAYERS[-1] + 1]):
            x = module(x)
            if place in LAYERS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + TINY))
        return found


def _heads(checkpoint: Checkpoint, widths: list[int]) -> list[Tensor]:
    """The channel weights (C, 1, 1) of each layer."""
    found = {int(match[1]): value for name, value in checkpoint.state.items() if (match := HEAD.fullmatch(name))}
    fitting = [
        number in found and tuple(found[number].shape) == (1, width, 1, 1) for number, width in enumerate(widths)
    ]
    if not all(fitting) or len(found) != len(widths):
        raise checkpoint.unfit(f"expected heads lin0 to lin4 for {', '.join(map(str, widths))} channels")
    return [found[number][0].float() for number in range(len(widths))]
