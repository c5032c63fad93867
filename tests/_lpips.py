"""Random weights of LPIPS's two networks, in files like the released ones."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from rewardsr.rewards.lpips import GROUPS

WIDTHS = (4, 4, 6, 6, 6)


def write_lpips(folder: Path, widths: tuple[int, ...] = WIDTHS) -> dict[str, str]:
    """Random files like torchvision's VGG16 and LPIPS's heads, as options of the trainer."""
    random = torch.Generator().manual_seed(0)
    tensors, place, before = {}, 0, 3
    for width, count in zip(widths, GROUPS, strict=True):
        for _ in range(count):
            scale = (2 / (9 * before)) ** 0.5
            tensors[f"features.{place}.weight"] = scale * torch.randn(width, before, 3, 3, generator=random)
            tensors[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=random)
            place, before = place + 2, width
        place += 1
    heads = {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1, generator=random) for n, w in enumerate(widths)}
    save_file(tensors, folder / "vgg.safetensors")
    torch.save(heads, folder / "heads.pth")
    return {"vgg": str(folder / "vgg.safetensors"), "lpips": str(folder / "heads.pth")}
