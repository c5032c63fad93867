"""What crosses the boundary between pipelines and everything else: images with what belongs to them, and conditions.

Images are (B, 3, H, W) float32 RGB in [0, 1]; latents (B, C, h, w) float32. Members of a group are adjacent rows (b0g0,
b0g1, ..., b1g0, ...), made by `repeat` and nowhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rewardsr.transfer import to_device


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

    def rows(self, rows: slice | Tensor) -> "Batch":
        """Some rows, as a slice or an index (R,) int64 on the CPU."""
        places = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()

        def some(tensor: Tensor) -> Tensor:
            return tensor[rows] if isinstance(rows, slice) else pick(tensor, places)

        return replace(
            self,
            lq=some(self.lq),
            hq=None if self.hq is None else some(self.hq),
            prompts=None if self.prompts is None else tuple(self.prompts[place] for place in places),
            paths=tuple(self.paths[place] for place in places) if self.paths else (),
            extras={name: some(value) for name, value in self.extras.items()},
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
            lq=to_device(self.lq, device),
            hq=None if self.hq is None else to_device(self.hq, device),
            extras={name: to_device(value, device) for name, value in self.extras.items()},
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

    def rows(self, rows: slice | Tensor | Sequence[int]) -> "Condition":
        """Some rows: a chunk of a batch that does not fit at once, say.

        Args:
            rows: a slice, an index (R,) int64, or numbers, for which a card need not wait (`pick`).
        """
        return self._map(lambda tensor: tensor[rows] if isinstance(rows, slice | Tensor) else pick(tensor, rows))

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        each = [value.values() if isinstance(value, Mapping) else [value] for value in values]
        return [value for some in each for value in some if isinstance(value, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Condition":
        """The same with other tensors, in the order of `tensors`."""
        given = iter(tensors)
        return self._map(lambda _: next(given))

    def beside(self, *others: "Condition") -> "Condition":
        """The rows of several conditions of one kind and size, one condition after another."""
        return self._map(lambda *tensors: torch.cat(tensors), *others)

    def window(self, rows: slice, columns: slice) -> "Condition":
        """What conditions a part of the latents; `size` stays that of the whole image."""
        control = self.control
        if control is not None:
            k = control.shape[-1] // self.latents.shape[-1]
            control = control[..., rows.start * k : rows.stop * k, columns.start * k : columns.stop * k]
        return replace(self, latents=self.latents[..., rows, columns], control=control)

    def _map(self, change: Callable[..., Tensor], *others: "Condition") -> "Condition":
        changed: dict[str, Any] = {}
        for entry in fields(self):
            values = [getattr(condition, entry.name) for condition in (self, *others)]
            if isinstance(values[0], Tensor):
                changed[entry.name] = change(*values)
            elif isinstance(values[0], Mapping):
                changed[entry.name] = {name: change(*(value[name] for value in values)) for name in values[0]}
        return replace(self, **changed)


def parts(count: int, most: int | None) -> list[slice]:
    """Rows 0 .. count-1 in as few parts as have at most `most` rows (None: in one), all as long, or one row shorter."""
    number = 1 if most is None else -(-count // most)
    edges = [count * part // number for part in range(number + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def pick(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor (B, ...) by their numbers: views put together, where an index would be copied to the device."""
    return torch.stack([tensor[row] for row in rows])


def cut(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """(B, C, side, side) of (B, C, H, W): the window of each row whose top left corner is in `corners` (B, 2)."""
    places = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in places])
