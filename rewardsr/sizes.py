"""Images and latents of any size: enlarged, padded, and cut where they are too large for a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rewardsr.draws import Source
from rewardsr.tiling import AutoencoderTiles, Tiling


class Sizes(ABC):
    """The part of `rewardsr.adapter.ISRAdapter` that sizes matter to; its attributes are explained there."""

    scale: int
    size_multiple: int
    steps: tuple[float, ...]
    networks: dict[str, nn.Module]
    tiling: Tiling | None = None
    vae_tile: int | None = 1024

    @property
    def compression(self) -> int:
        """How many pixels a latent is wide; `size_multiple`, unless a family pads to more than that."""
        return self.size_multiple

    @abstractmethod
    def _to_latents(self, image: Tensor, generator: Source | None) -> Tensor: ...

    @abstractmethod
    def _to_image(self, z0: Tensor) -> Tensor: ...

    def upsample(self, lq: Tensor) -> Tensor:
        """LQ images (B, 3, h, w) at output size, bicubic as PIL has it, in [0, 1]."""
        if self.scale == 1:
            return lq
        size = (lq.shape[-2] * self.scale, lq.shape[-1] * self.scale)
        return nn.functional.interpolate(lq, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    def upsample_part(self, lq: Tensor, rows: slice, columns: slice) -> Tensor:
        """`upsample(lq)[..., rows, columns]`, of which no more is computed than that."""
        reach = 3 * (self.scale > 1)  # of the bicubic weights, in LQ pixels, and one more
        near = [slice(max(0, s.start // self.scale - reach), -(-s.stop // self.scale) + reach) for s in (rows, columns)]
        top, left = (part.start * self.scale for part in near)
        part = self.upsample(lq[..., near[0], near[1]])
        return part[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def pad(self, image: Tensor) -> Tensor:
        """The image padded at the bottom and right (replicate) to `size_multiple`."""
        right, bottom = -image.shape[-1] % self.size_multiple, -image.shape[-2] % self.size_multiple
        return nn.functional.pad(image, (0, right, 0, bottom), mode="replicate") if right or bottom else image

    def lq_latents(self, lq: Tensor, generator: Source | None = None) -> Tensor:
        """Latents (B, C, h, w) of LQ images (B, 3, h, w), enlarged and padded; large ones tile by tile.

        As `to_latents(upsample(lq))`, but a large image is at no time whole at output size.
        """
        height, width = (side * self.scale for side in lq.shape[-2:])

        def part(which: slice, rows: slice, columns: slice) -> Tensor:
            # Beyond the image is padding: its last row and column again.
            top, left = min(rows.start, height - 1), min(columns.start, width - 1)
            inside = self.upsample_part(lq[which], slice(top, rows.stop), slice(left, columns.stop))
            bottom, right = rows.stop - rows.start - inside.shape[-2], columns.stop - columns.start - inside.shape[-1]
            return nn.functional.pad(inside, (0, right, 0, bottom), mode="replicate")

        return self._encoded(len(lq), (self._padded(height), self._padded(width)), part, generator)

    @torch.no_grad()
    def calls(self, height: int, width: int) -> int:
        """How many tiles an LQ image of this size is encoded, denoised (at all steps) and decoded in."""
        latents = [self._padded(side * self.scale) // self.compression for side in (height, width)]
        tiles = self._autoencoder_tiles(*latents)
        coded = 1 if tiles is None else tiles.count(*latents)
        return 2 * coded + len(self.steps) * (1 if self.tiling is None else self.tiling.count(*latents))

    def _padded(self, side: int) -> int:
        return side + -side % self.size_multiple

    def _autoencoder_tiles(self, height: int, width: int) -> AutoencoderTiles | None:
        """How latents of this size are encoded and decoded; None: at once."""
        if self.vae_tile is None or torch.is_grad_enabled():
            return None
        tiles = AutoencoderTiles(self.networks.values(), self.vae_tile // self.compression, self.compression)
        return tiles if tiles.count(height, width) > 1 else None

    def _encoded(
        self, count: int, size: Sequence[int], part: Callable[[slice, slice, slice], Tensor], generator: Source | None
    ) -> Tensor:
        """Latents of `count` padded images of one size, which `part` gives by images, rows and columns."""
        latents = (size[0] // self.compression, size[1] // self.compression)
        tiles = self._autoencoder_tiles(*latents)
        if tiles is not None:
            return tiles.encode(self._to_latents, part, (count, *latents), generator)
        whole = part(slice(0, count), slice(0, size[0]), slice(0, size[1]))
        return self._to_latents(whole, generator).float()

    def _decoded(self, z0: Tensor) -> Tensor:
        tiles = self._autoencoder_tiles(z0.shape[-2], z0.shape[-1])
        return self._to_image(z0).float() if tiles is None else tiles.decode(self._to_image, z0)
