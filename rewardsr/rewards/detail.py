"""Detail without a network: how much high frequency there is, and whether it is as much as HQ has.

Gray is BT.601 luma in full range [0, 1]; the Laplacian is the four-neighbour one, edges replicated.
"""

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.rewards.fidelity import target
from rewardsr.rewards.precision import computing
from rewardsr.transfer import to_device

CELL = 8  # pixels: the neighbourhood in which energy is compared
FLOOR = 0.01  # energy below this counts as flat; keeps the logarithm of noise-free areas apart from -inf


class Detail:
    """Agreement of local high-frequency energy with HQ; 0 is best, lower is worse.

    Energy is the absolute Laplacian averaged over 8x8 cells (cells at the right and bottom edge may be smaller); the
    score is minus the mean over cells of |log(energy_sr + 0.01) - log(energy_hq + 0.01)|. Too smooth costs, and so
    does sharpening past HQ. Where exactly the detail lies inside a cell does not matter.
    """

    name = "detail"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "detail"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,), at most 0; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1].

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        with computing(sr.device):
            return -(_log_energy(sr) - _log_energy(target(self.name, sr, batch))).abs().mean((1, 2, 3))


class Sharpness:
    """Mean absolute Laplacian of gray; higher is sharper, without end: noise scores best of all.

    A one-sided reward for demonstrations and negative controls; `detail` is the one to train with.
    """

    name = "sharpness"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "detail"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in [0, 4]; `sr` is (B, 3, H, W) in [0, 1]."""
        with computing(sr.device):
            return _absolute_laplacian(sr).mean((1, 2, 3))


class LQConsistency:
    """Agreement of `sr`, made small again, with `lq`: minus the mean absolute difference; 0 is best.

    `sr` is reduced by averaging areas; at scale 1 it is compared as it is. Needs no HQ, and holds a no-reference
    reward back from inventing other content.
    """

    name = "lq_consistency"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    light = True
    kind = "fidelity"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in [-1, 0]; `sr` (B, 3, H, W) and `batch.lq` (B, 3, h, w) in [0, 1], h <= H, w <= W.

        Raises:
            ValueError: another number of rows, or an `lq` larger than `sr`.
        """
        lq = batch.lq
        if lq.shape[0] != sr.shape[0] or lq.shape[-2] > sr.shape[-2] or lq.shape[-1] > sr.shape[-1]:
            raise ValueError(
                f"{self.name}: expected lq of as many rows as sr and not larger, "
                f"got sr {tuple(sr.shape)} and lq {tuple(lq.shape)}"
            )
        with computing(sr.device):
            return -(F.interpolate(sr.float(), size=lq.shape[-2:], mode="area") - lq.float()).abs().mean((1, 2, 3))


def _absolute_laplacian(image: Tensor) -> Tensor:
    """|Laplacian| of gray (B, 1, H, W), of RGB (B, 3, H, W) in [0, 1]."""
    kernel = to_device(torch.tensor([[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]]), image.device)
    return filter2d(rgb_to_grayscale(image.float()), kernel, border_type="replicate").abs()


def _log_energy(image: Tensor) -> Tensor:
    """Logarithm of the energy of each cell (B, 1, ceil(H / 8), ceil(W / 8)), of RGB (B, 3, H, W) in [0, 1]."""
    energy = F.avg_pool2d(_absolute_laplacian(image), CELL, ceil_mode=True, count_include_pad=False)
    return (energy + FLOOR).log()
