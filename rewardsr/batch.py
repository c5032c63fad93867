"""What crosses the boundary between pipelines and everything else: images with what belongs to them, and conditions.

Images are (B, 3, H, W) float32 RGB in [0, 1]; latents (B, C, h, w) float32. Members of a group are adjacent rows (b0g0,
b0g1, ..., b1g0, ...), made by `repeat` and nowhere else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images and what belongs to them, row by row.

    Attributes:
        lq: (B, 3, h, w) in [0, 1].
        hq: (B, 3, H, W) in [0, 1], or None where there is no target.
        prompts: one text an image; None, for one image or for all, leaves the text to the adapter.
        paths: where each image came from, for messages; may be empty.
        extras: what a pipeline family needs besides (image embeddings, say), first dimension B.
    """

    lq: Tensor
    hq: Tensor | None = None
    prompts: tuple[str | None, ...] | None = None
    paths: tuple[str, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.lq.shape[0])

    def repeat(self, group: int) -> "Batch":
        """Every row `group` times, adjacent."""
        return replace(
            self,
            lq=self.lq.repeat_interleave(group, 0),
            hq=None if self.hq is None else self.hq.repeat_interleave(group, 0),
            prompts=None if self.prompts is None else tuple(p for p in self.prompts for _ in range(group)),
            paths=tuple(p for p in self.paths for _ in range(group)),
            extras={name: value.repeat_interleave(group, 0) for name, value in self.extras.items()},
        )

    def rows(self, index: Tensor) -> "Batch":
        """The rows of an index (R,) int64."""
        places = index.tolist()
        return replace(
            self,
            lq=self.lq[index.to(self.lq.device)],
            hq=None if self.hq is None else self.hq[index.to(self.hq.device)],
            prompts=None if self.prompts is None else tuple(self.prompts[place] for place in places),
            paths=tuple(self.paths[place] for place in places) if self.paths else (),
            extras={name: value[index.to(value.device)] for name, value in self.extras.items()},
        )

    def crop(self, corners: Tensor, side: int, scale: int) -> "Batch":
        """Square windows of the images, one a row.

        Args:
            corners: (B, 2) int64, top left corner of each in HQ pixels, multiples of `scale`.
            side: of the windows in HQ pixels, a multiple of `scale`.
            scale: `hq` is this many times `lq`.
        """
        hq = None if self.hq is None else cut(self.hq, corners, side)
        return replace(self, lq=cut(self.lq, corners // scale, side // scale), hq=hq)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on another device; what goes from the CPU to CUDA is not waited for."""
        return replace(
            self,
            lq=_moved(self.lq, device),
            hq=None if self.hq is None else _moved(self.hq, device),
            extras={name: _moved(value, device) for name, value in self.extras.items()},
        )


@dataclass(frozen=True)
class Condition:
    """What denoising is conditioned on; every tensor has first dimension B.

    Attributes:
        text: (B, L, D) prompt embeddings.
        latents: (B, C, h, w) latents of the upsampled and padded LQ image.
        size: height and width of `sr` in pixels, before padding.
        negative: (B, L, D) embeddings of the negative prompt, where guidance is used.
        pooled, negative_pooled: (B, D) one vector a prompt, where the family's text encoders give some.
        control: (B, 3, k h, k w) image that conditions each place (a ControlNet's, the LQ image); k is whole.
        extras: anything else a family needs; nothing that belongs to a place.
    """

    text: Tensor
    latents: Tensor
    size: tuple[int, int]
    negative: Tensor | None = None
    pooled: Tensor | None = None
    negative_pooled: Tensor | None = None
    control: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.latents.shape[0])

    def repeat(self, group: int) -> "Condition":
        """Every row `group` times, adjacent: the one place where groups are made."""
        return self._map(lambda tensor: tensor.repeat_interleave(group, 0))

    def rows(self, rows: slice | Tensor) -> "Condition":
        """Some rows, as a slice or an index (R,) int64: a chunk of a batch that does not fit at once, say."""
        return self._map(lambda tensor: tensor[rows])

    def window(self, rows: slice, columns: slice) -> "Condition":
        """What conditions a part of the latents; `size` stays that of the whole image."""
        control = self.control
        if control is not None:
            k = control.shape[-1] // self.latents.shape[-1]
            control = control[..., rows.start * k : rows.stop * k, columns.start * k : columns.stop * k]
        return replace(self, latents=self.latents[..., rows, columns], control=control)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                changed[entry.name] = change(value)
            elif isinstance(value, Mapping):
                changed[entry.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **changed)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device; through pinned memory where CUDA is in use, so that the copy runs beside what follows."""
    to_cuda = tensor.device.type == "cpu" and torch.device(device).type == "cuda" and torch.cuda.is_initialized()
    return tensor.pin_memory().to(device, non_blocking=True) if to_cuda else tensor.to(device)


def cut(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """(B, C, side, side) of (B, C, H, W): the window of each row whose top left corner is in `corners` (B, 2)."""
    places = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in places])
