"""The two-pass degradation of Real-ESRGAN (arXiv 2107.10833), with GDPO-SR's numbers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.data.degrade.drawn import DrawnPass, Mode, Size, draw_passes
from rewardsr.data.degrade.kernels import filtered
from rewardsr.data.degrade.parts import check_images, jpeg, to_8_bits
from rewardsr.data.degrade.settings import RealESRGANOptions


class RealESRGAN:
    """Twice blur, resize, noise and JPEG; then the size of LQ, a sinc filter, and 8 bits.

    Images of a batch are filtered together where they are of one size, before the first resize and after the last;
    in between every one has a size of its own. JPEG runs on the CPU. There is no sharpening, and no colour jitter;
    LQ images keep their native size.
    """

    Options = RealESRGANOptions

    def __init__(self, options: RealESRGANOptions, scale: int) -> None:
        self._options = options
        self._scale = scale

    def __call__(self, hq: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Degrade images; arguments, result and errors are those of `rewardsr.data.degrade.light.Light`."""
        check_images(hq, generators, self._scale)
        height, width = hq.shape[2:]
        largest = self._options.kernel.size[1]
        drawn = [draw_passes(self._options, self._scale, (height, width), own) for own in generators]
        images = filtered(hq.detach(), [own.first.kernel for own in drawn], largest)
        small = []
        for image, own in zip(images, drawn, strict=True):
            image = jpeg(_resized_with_noise(image, own.first), own.first.quality)
            image = filtered(image[None], [own.second.kernel], largest)[0]
            image = _resized_with_noise(image, own.second)
            if not own.jpeg_last:
                image = jpeg(image, own.second.quality)
            small.append(_resized(image, (height // self._scale, width // self._scale), own.mode))
        ended = filtered(torch.stack(small), [own.sinc for own in drawn], largest)
        return torch.stack(
            [
                jpeg(image, own.second.quality) if own.jpeg_last else to_8_bits(image)
                for image, own in zip(ended, drawn, strict=True)
            ]
        )


def _resized_with_noise(image: Tensor, drawn: DrawnPass) -> Tensor:
    return drawn.noise(_resized(image, drawn.size, drawn.mode)).clamp(0, 1)


def _resized(image: Tensor, size: Size, mode: Mode) -> Tensor:
    """The image (3, H, W) in another size, without antialiasing, which the published degradation does not have."""
    return F.interpolate(image[None], size, mode=mode)[0]
