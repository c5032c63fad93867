"""VGG19 features for style distances: torchvision's network and weights, or a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr.errors import UserError
from rewardsr.hub import connection
from rewardsr.weights import read_pickle, read_safetensors

# Convolutions of VGG19 between its poolings; the last of each group is a layer that `VGG19` returns.
GROUPS = (2, 2, 4, 4, 4)
LAYERS = ("conv1_2", "conv2_2", "conv3_4", "conv4_4", "conv5_4")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights expect


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

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        state = _download() if weights is None else _read(Path(weights).expanduser())
        self.features = _build(state, "its weights" if weights is None else f"'{weights}'")
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features (B, C, h, w) by layer, of images (B, 3, H, W) in [0, 1] of at least 16 pixels a side."""
        found: dict[str, Tensor] = {}
        with torch.autocast(image.device.type, enabled=False):
            x = (image.float() - self.mean) / self.std
            convolutions, wanted = 0, dict(zip(_ends(), LAYERS, strict=True))
            for module in self.features:
                x = module(x)
                if isinstance(module, nn.Conv2d):
                    convolutions += 1
                    if convolutions in wanted:
                        found[wanted[convolutions]] = x
                    if len(found) == len(LAYERS):
                        break
        return found


def _ends() -> list[int]:
    return [sum(GROUPS[: group + 1]) for group in range(len(GROUPS))]


def _build(state: dict[str, Tensor], where: str) -> nn.Sequential:
    """The convolutional part for tensors `features.N.weight`, whose shapes say how wide it is."""
    from torchvision.models.vgg import make_layers

    own = {
        name.removeprefix("features."): value.float() for name, value in state.items() if name.startswith("features")
    }
    kernels = [value for name, value in own.items() if name.endswith(".weight")]
    if len(kernels) != sum(GROUPS) or any(kernel.ndim != 4 for kernel in kernels):
        raise UserError(f"{where} holds no VGG19: expected {sum(GROUPS)} convolutions features.N.weight")
    if not all(value.isfinite().all() for value in own.values()):
        raise UserError(f"{where}: VGG19 with values that are not finite")
    in_order = sorted((name for name in own if name.endswith(".weight")), key=lambda name: int(name.split(".")[0]))
    widths = iter([own[name].shape[0] for name in in_order])
    plan: list[Any] = [entry for group in GROUPS for entry in (*(next(widths) for _ in range(group)), "M")]
    layers: nn.Sequential = make_layers(plan)
    try:
        layers.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise UserError(f"{where} does not fit VGG19: {' '.join(str(error).split())[:200]}") from error
    for module in layers:
        if isinstance(module, nn.ReLU):
            module.inplace = False  # the features are taken before it
    return layers


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"VGG19: no weights file '{path}'")
    content = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"'{path}' holds no VGG19 (tensors by name)")
    return content


def _download() -> dict[str, Tensor]:
    """torchvision's weights: from torch's cache, else fetched once (548 MB)."""
    from torchvision.models import VGG19_Weights

    weights = VGG19_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if cached.is_file():
        return _read(cached)
    if not connection.online():
        raise UserError(
            f"VGG19's weights ({cached.name}) are not in torch's cache and there is no connection to fetch them: "
            "connect once, or give trainer_options.vgg=FILE, or switch the style term off with "
            "trainer_options.kl_weight=0"
        )
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # urllib's and torch's errors are many
        raise UserError(f"VGG19's weights could not be fetched: {' '.join(str(error).split())}") from error
    return state
