"""FID, which compares sets of images: pyiqa's, on folders."""

from pathlib import Path
from typing import Any

import torch

from rewardsr.rewards.iqa import _cached_or_fetched, _without_output

FID = "fid"


class FrechetDistance:
    """The distance of two sets of images in the features of an Inception network; lower is better.

    Built before any work; its weights come from pyiqa's cache, else are downloaded. pyiqa resizes as clean-fid does.

    Raises:
        UserError: pyiqa or the weights cannot be had.
    """

    def __init__(self) -> None:
        with _without_output(), torch.random.fork_rng(devices=[]):
            self._network: Any = _cached_or_fetched(FID, {}).net.eval()

    @torch.no_grad()
    def __call__(self, folder: Path, other: Path, device: torch.device) -> float:
        """The distance of the PNG files in two folders, of two or more each."""
        distance = self._network.to(device)(
            str(folder), str(other), device=device, num_workers=0, batch_size=8, verbose=False
        )
        return float(distance)
