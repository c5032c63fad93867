"""Attribute-aware weighting of GDPO-SR (arXiv 2603.16769): how much of an image is texture.

Where HQ is texture, generated detail should count; where it is smooth, fidelity should. The image is cut into cells of
10x10 pixels (what remains at the right and bottom forms smaller cells), each is resized to 64x64, and the entropy of
its gradient magnitudes, times its area in pixels, is its complexity; above 50 it is texture.

The released code swaps red and blue when it computes gray. Here gray is BT.601; shares differ by up to 0.02 for it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.rewards.precision import computing
from rewardsr.transfer import to_device

CELL = 10  # pixels
SIDE = 64  # every cell is resized to this
BINS, LIMIT = 512, 5.5  # of the histogram over [-LIMIT, LIMIT]; magnitudes fill the upper half only
THRESHOLD = 50.0  # bits x pixels
CHUNK = 256  # cells at once: some tens of MB of temporaries


def texture_share(hq: Tensor) -> Tensor:
    """Share of the pixels that lie in textured cells: the weight of detail; the rest is the weight of fidelity.

    Args:
        hq: (B, 3, H, W) RGB in [0, 1].

    Returns:
        (B,) float32 in [0, 1], on the device of `hq`, without gradient.
    """
    height, width = hq.shape[-2:]
    textured = (complexity_map(hq) > THRESHOLD).float()
    rows, columns = _sizes(height, hq.device), _sizes(width, hq.device)
    return (textured * torch.outer(rows, columns)).sum((1, 2)) / (height * width)


@torch.no_grad()
def complexity_map(hq: Tensor) -> Tensor:
    """Complexity of every cell: entropy of its gradient magnitudes (bits) times its area (pixels).

    Args:
        hq: (B, 3, H, W) RGB in [0, 1].

    Returns:
        (B, ceil(H / 10), ceil(W / 10)) float32, at least 0, at most 800 (8 bits on 100 pixels).

    Raises:
        ValueError: not a batch of RGB images.
    """
    if hq.ndim != 4 or hq.shape[1] != 3:
        raise ValueError(f"complexity_map: expected (B, 3, H, W), got {tuple(hq.shape)}")
    with computing(hq.device):
        gray = _gray_levels(hq)
        height, width = gray.shape[-2:]
        bands = [torch.cat([_entropies(part) for part in row], -1) for row in _parts(gray)]
        return torch.cat(bands, -2) * torch.outer(_sizes(height, hq.device), _sizes(width, hq.device))


def _gray_levels(image: Tensor) -> Tensor:
    """Gray (B, H, W) as whole numbers 0..255: without rounding, smooth areas would not have zero gradients."""
    red, green, blue = (image.float().clamp(0, 1) * 255).round().long().unbind(1)
    return ((9798 * red + 19235 * green + 3735 * blue + 16384) >> 15).float()  # 0.299, 0.587, 0.114 in 15 bits


def _sizes(length: int, device: torch.device) -> Tensor:
    """Lengths of the cells along one side, the remainder last: 512 gives 51 times 10, then 2."""
    whole, rest = divmod(length, CELL)
    return to_device(torch.tensor([CELL] * whole + [rest] * (rest > 0), dtype=torch.float32), device)


def _parts(gray: Tensor) -> Iterator[list[Tensor]]:
    """The image in up to two by two parts, each (B, rows, columns, h, w) of equally large cells."""
    height, width = gray.shape[-2:]
    for band in gray.split([height - height % CELL, height % CELL], -2):
        parts = []
        for part in band.split([width - width % CELL, width % CELL], -1):
            if part.numel():
                h, w = min(part.shape[-2], CELL), min(part.shape[-1], CELL)
                parts.append(part.unfold(-2, h, h).unfold(-2, w, w))
        if parts:
            yield parts


def _entropies(cells: Tensor) -> Tensor:
    """Entropy in bits of the gradient magnitudes of cells (B, rows, columns, h, w), as (B, rows, columns)."""
    flat = cells.reshape(-1, 1, *cells.shape[-2:])
    return torch.cat([_entropy(chunk) for chunk in flat.split(CHUNK)]).reshape(cells.shape[:3])


def _entropy(cells: Tensor) -> Tensor:
    """Entropy in bits (N,) of gray cells (N, 1, h, w) with levels 0..255."""
    resized = F.interpolate(cells, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    # Gray stays in whole levels up to here, where float32 is exact. From here on the released code's double precision
    # decides on which side of a bin's edge a gradient falls; Apple's devices have none.
    precise = torch.float32 if cells.device.type == "mps" else torch.float64
    magnitude = _sobel_magnitude(resized.to(precise) / 255).flatten(1)
    # The magnitudes' half of the histogram; what lies beyond LIMIT goes to one bin more, which is dropped.
    half = BINS // 2
    bins = (magnitude * (half / LIMIT)).long().clamp_(max=half)
    offset = torch.arange(len(cells), device=cells.device)[:, None] * (half + 1)
    # Not torch.bincount, which waits for the device to learn the largest bin. Whole numbers: any order gives the same.
    places = (bins + offset).flatten()
    counts = magnitude.new_zeros(len(cells) * (half + 1), dtype=torch.float32)
    counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
    filled = counts.reshape(len(cells), half + 1)[:, :half]
    share = filled / (filled.sum(1, keepdim=True) + 1e-5)
    return -torch.xlogy(share, share).sum(1) / torch.tensor(2.0).log().item()


def _sobel_magnitude(image: Tensor) -> Tensor:
    """Length of the Sobel gradient (N, 1, h, w) of an image (N, 1, h, w), edges replicated."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 2:] - padded[..., :-2]
    down = padded[..., 2:, :] - padded[..., :-2, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return torch.hypot(across, down)
