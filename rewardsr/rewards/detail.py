"""Detail without a network: how much high frequency there is, whether it is as much as HQ has, and where HQ has it.

Gray is BT.601 luma in full range [0, 1]; the Laplacian is the four-neighbour one, edges replicated. Cells are 8x8
pixels; those at the right and bottom edge may be smaller.
"""

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d, filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.rewards.fidelity import target
from rewardsr.rewards.precision import computing
from rewardsr.transfer import to_device

CELL = 8  # pixels: the neighbourhood in which detail is compared
FLOOR = 0.01  # energy below this counts as flat; keeps the logarithm of noise-free areas apart from -inf
LEVEL = 1 / 255  # high frequencies whose root mean square is well below one 8-bit level count as none


class Detail:
    """Agreement of local high-frequency energy with HQ; 0 is best, lower is worse.

    Energy is the absolute Laplacian averaged over cells; the score is minus the mean over cells of
    |log(energy_sr + 0.01) - log(energy_hq + 0.01)|. Too smooth costs, and so does sharpening past HQ. Where exactly the
    detail lies inside a cell does not matter: that is what `detail_correlation` sees.
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


class DetailCorrelation:
    """Local correlation of high frequencies with those of HQ: 1 where detail lies as in HQ, 0 where it has no relation.

    High frequencies x (of `sr`) and y (of HQ) are gray minus its Gaussian blur (11x11 pixels, sigma 1.5, edges
    replicated): details of up to about 8 pixels a period. With <.> the mean over a cell and c = (1/255)^2, a cell's
    correlation and weight are

        r = (<x y> + c) / sqrt((<x x> + c) (<y y> + c)),    w = sqrt(<y y> + c),

    and the score is sum(w r) / sum(w) over cells: it counts where HQ has detail. c keeps gradients finite, lets two
    flat cells agree (r = 1), and texture added to a flat one disagree (r towards 0). Brightness has no effect.

    A correlation does not depend on contrast: HQ with half or twice its detail scores nearly 1. That is on purpose: how
    much there is, `detail` measures; here neither sharpening nor added texture pays, unless it is HQ's. (SSIM's form of
    r, 2 <x y> over <x x> + <y y>, asks for the right contrast too, and so pays for sharpening a blurred image.)
    """

    name = "detail_correlation"
    differentiable = True
    needs_hq = True
    licence = "Apache-2.0"
    light = True
    kind = "detail"

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score (B,) in [-1, 1] up to rounding, 1 for HQ itself; `sr` and `batch.hq` are (B, 3, H, W) in [0, 1].

        Raises:
            UserError: the batch has no HQ images.
            ValueError: shapes differ.
        """
        with computing(sr.device):
            x, y = high_frequencies(sr), high_frequencies(target(self.name, sr, batch))
            covariance, energy, weight = _cells(x * y) + LEVEL**2, _cells(x * x) + LEVEL**2, _cells(y * y) + LEVEL**2
            # The square root of HQ's energy is both its part of the correlation and the weight: the two cancel out.
            return (covariance / energy.sqrt()).sum((1, 2, 3)) / weight.sqrt().sum((1, 2, 3))


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
    margin = 0.01

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


def high_frequencies(image: Tensor) -> Tensor:
    """Gray (B, 1, H, W) minus its Gaussian blur, of RGB (B, 3, H, W) in [0, 1]."""
    gray = rgb_to_grayscale(image.float())
    kernel = to_device(get_gaussian_kernel1d(11, 1.5), image.device)
    return gray - filter2d_separable(gray, kernel, kernel, border_type="replicate")


def _log_energy(image: Tensor) -> Tensor:
    """Logarithm of the energy of each cell (B, 1, ceil(H / 8), ceil(W / 8)), of RGB (B, 3, H, W) in [0, 1]."""
    return (_cells(_absolute_laplacian(image)) + FLOOR).log()


def _cells(values: Tensor) -> Tensor:
    """Mean of each cell (B, 1, ceil(H / 8), ceil(W / 8)), of (B, 1, H, W)."""
    return F.avg_pool2d(values, CELL, ceil_mode=True, count_include_pad=False)
