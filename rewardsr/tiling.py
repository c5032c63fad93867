"""Images and latents that are too large for one network call: overlapping tiles, blended."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from rewardsr.batch import parts
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
from rewardsr.pooling import Pooled
from rewardsr.transfer import to_device

Window = tuple[slice, slice]  # rows and columns that a tile covers
VARIANCE = 0.01  # of the weights, in squares of the tile's side: SeeSR's and StableSR's
PATCHES = 16  # that an autoencoder's norms are measured on, together as large as a tile

_advance: ContextVar[Callable[[int], object] | None] = ContextVar("advance", default=None)


@contextmanager
def counted(advance: Callable[[int], object]) -> Iterator[None]:
    """Tiles that are done inside are told to `advance`, by their number."""
    before = _advance.set(advance)
    try:
        yield
    finally:
        _advance.reset(before)


def _done(count: int) -> None:
    advance = _advance.get()
    if advance is not None:
        advance(count)


@dataclass(frozen=True)
class Tiling:
    """How latents are cut for the denoising network and blended by Gaussian weights, as in SeeSR and StableSR.

    Attributes:
        side: of a tile, in latent pixels; only latents of a larger area are cut.
        overlap: of neighbouring tiles, in latent pixels; the last tile of a row or column may overlap by more. Latents
            that are narrower than a tile are cut into squares of their width, which overlap by the same share.
        at_once: how many tiles of an image go through the network in one call, at most.
        off_centre: weights as released, whose centre lies half a pixel too low; for comparison.
    """

    side: int
    overlap: int
    at_once: int = 4
    off_centre: bool = False

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 <= self.overlap < self.side:
            raise UserError(f"tile is {self.side} with an overlap of {self.overlap}: expected 0 <= overlap < tile")

    def cuts(self, z: Tensor) -> bool:
        """Whether latents (B, C, h, w) are cut: the rule of the originals, by area and not by side."""
        return self.count(z.shape[-2], z.shape[-1]) > 1

    def count(self, height: int, width: int) -> int:
        """How many tiles latents of this size are cut into."""
        side = min(self.side, height, width)
        if height * width <= self.side**2:
            return 1
        return len(self._starts(height, side)) * len(self._starts(width, side))

    def apply(self, predict: Callable[[Sequence[Window]], Tensor], like: Tensor) -> Tensor:
        """Blend the predictions of all tiles.

        Args:
            predict: gives the predictions (N*B, C, side, side) of the parts in N windows, one window after another.
            like: latents (B, C, h, w) of the whole.

        Returns:
            (B, C, h, w), the weighted mean of the tiles that cover a place.
        """
        height, width = like.shape[-2:]
        side = min(self.side, height, width)
        total, weight = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
        share = to_device(self._weights(side).to(like.dtype), like.device)  # Apple's devices have no double precision
        places = product(self._starts(width, side), self._starts(height, side))
        windows = [(slice(top, top + side), slice(left, left + side)) for left, top in places]
        for part in parts(len(windows), self.at_once):
            some = windows[part]
            for (rows, columns), prediction in zip(some, predict(some).chunk(len(some)), strict=True):
                total[..., rows, columns] += share * prediction
                weight[..., rows, columns] += share
            _done(len(some))
        return total / weight

    def _starts(self, length: int, side: int) -> list[int]:
        step = side - self.overlap * side // self.side
        return [*range(0, length - side, step), length - side]

    def _weights(self, side: int) -> Tensor:
        """(side, side), in double precision: at the corners they are a billionth of those at the centre."""
        places, middle = torch.arange(side, dtype=torch.float64), (side - 1) / 2
        down, across = (
            torch.exp(-(((places - centre) / side) ** 2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)
            for centre in (side / 2 if self.off_centre else middle, middle)
        )
        return torch.outer(down, across)


class AutoencoderTiles:
    """How images are cut for an autoencoder, so that tiles join without a seam.

    Tiles overlap by a quarter of their side, further than an autoencoder's convolutions reach for the most part, and
    fade into each other in the middle of that. All are normalised alike, by patches of the whole (`rewardsr.pooling`).

    Args:
        networks: the autoencoder, or what it is among.
        side: of a tile, in latents; larger areas are cut.
        unit: how many pixels a latent is wide.
    """

    def __init__(self, networks: Iterable[nn.Module], side: int, unit: int) -> None:
        self._networks, self.side, self.unit = networks, max(1, side), unit
        self.overlap = side // 4

    def count(self, height: int, width: int) -> int:
        """How many network calls latents of this size take, the patches' among them."""
        if height * width <= self.side**2:
            return 1
        return 1 + len(self._axis(height, width).starts) * len(self._axis(width, height).starts)

    def encode(
        self,
        hook: Callable[[Tensor, Source | None], Tensor],
        part: Callable[[slice, slice, slice], Tensor],
        size: tuple[int, int, int],
        generator: Source | None,
    ) -> Tensor:
        """Latents (B, C, h, w) of images that are asked for tile by tile.

        Args:
            hook: an adapter's `_to_latents`.
            part: gives the pixels (b, 3, H, W) of some images, by their place in the batch, rows and columns.
            size: B, h and w.
            generator: draws what `hook` draws, as it would for whole images; None takes the mode.
        """
        count, *sides = size
        found = []
        for row in (slice(place, place + 1) for place in range(count)):
            source = generator if count == 1 or generator is None else generator.rows(row)
            found.append(self._encode_one(hook, partial(part, row), (sides[0], sides[1]), source))
        return torch.cat(found) if count > 1 else found[0]

    def decode(self, hook: Callable[[Tensor], Tensor], z0: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w), by an adapter's `_to_image`."""
        found = []
        for z in z0.split(1):

            def part(rows: slice, columns: slice, z: Tensor = z) -> Tensor:
                return z[..., rows, columns]

            def decoded(rows: slice, columns: slice, z: Tensor = z) -> Tensor:
                return hook(z[..., rows, columns]).float()

            found.append(self._joined(hook, part, decoded, (z.shape[-2], z.shape[-1]), self.unit))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _encode_one(
        self,
        hook: Callable[[Tensor, Source | None], Tensor],
        part: Callable[[slice, slice], Tensor],
        size: tuple[int, int],
        generator: Source | None,
    ) -> Tensor:
        source = None if generator is None else _InWindow(generator, size)

        def pixels(rows: slice, columns: slice) -> Tensor:
            return part(_times(rows, self.unit), _times(columns, self.unit))

        def encoded(rows: slice, columns: slice) -> Tensor:
            return hook(pixels(rows, columns), None if source is None else source.at(rows, columns)).float()

        return self._joined(lambda patches: hook(patches, None), pixels, encoded, size, 1)

    def _joined(
        self,
        measure: Callable[[Tensor], Tensor],
        part: Callable[[slice, slice], Tensor],
        result: Callable[[slice, slice], Tensor],
        size: tuple[int, int],
        unit: int,
    ) -> Tensor:
        """Results of all tiles, `unit` times as large as the windows (in latents) that they belong to."""
        down, across = (self._axis(*sizes) for sizes in (size, size[::-1]))
        pooled = Pooled(self._networks)
        patches, margin = self._patches(size)
        height, width = (patches[0][place].stop - patches[0][place].start for place in (0, 1))
        with pooled.measuring((height, width), margin):
            measure(torch.cat([part(*patch) for patch in patches]))
        _done(1)
        whole: Tensor | None = None
        with pooled.held():
            for top, left in product(range(len(down.starts)), range(len(across.starts))):
                rows, columns = down.window(top), across.window(left)
                tile = result(rows, columns)
                if whole is None:
                    whole = tile.new_zeros(*tile.shape[:2], *(length * unit for length in size))
                fade = torch.outer(down.weights(top, unit), across.weights(left, unit))
                whole[..., _times(rows, unit), _times(columns, unit)] += to_device(fade, tile.device) * tile
                _done(1)
        assert whole is not None
        return whole

    def _axis(self, length: int, other: int) -> "_Axis":
        # A narrow image is cut into longer tiles, of the same area.
        side = self.side**2 // min(self.side, other)
        return _Axis.cut(length, min(length, side), self.overlap)

    def _patches(self, size: tuple[int, int]) -> tuple[list[Window], tuple[int, int]]:
        """Windows of one size, spread evenly, and how much of their rows and columns sees their border."""
        height, width = size
        area = self.side**2 // PATCHES
        down = max(1, min(PATCHES, round(math.sqrt(PATCHES * height / width))))
        tall = min(height, max(1, round(math.sqrt(area))))
        wide = min(width, max(1, area // tall))
        down, across = 1 if tall == height else down, 1 if wide == width else max(1, PATCHES // down)
        starts = [_spread(height - tall, down), _spread(width - wide, across)]
        windows = [(slice(top, top + tall), slice(left, left + wide)) for top, left in product(*starts)]
        return windows, (0 if tall == height else tall // 6, 0 if wide == width else wide // 6)


@dataclass(frozen=True)
class _Axis:
    """Windows along one side of an image, all of one length, and how each fades into the next."""

    starts: list[int]
    side: int
    overlap: int

    @classmethod
    def cut(cls, length: int, side: int, overlap: int) -> "_Axis":
        """As few windows of at most this length as overlap by so much, none longer than need be."""
        overlap = min(overlap, side - 1)
        count = 1 if length <= side else -(-(length - overlap) // (side - overlap))
        side = -(-(length + (count - 1) * overlap) // count)
        return cls(_spread(length - side, count), side, overlap)

    def window(self, place: int) -> slice:
        return slice(self.starts[place], self.starts[place] + self.side)

    def weights(self, place: int, unit: int) -> Tensor:
        """(side * unit,): 1 inside, and a straight line across the middle quarter of what two windows share."""
        start = self.starts[place] * unit
        places = torch.arange(self.side * unit, dtype=torch.float32) + start + 0.5
        before, after = torch.ones_like(places), torch.zeros_like(places)
        if place:
            before = self._rise(place, unit, places)
        if place + 1 < len(self.starts):
            after = self._rise(place + 1, unit, places)
        return before * (1 - after)

    def _rise(self, place: int, unit: int, places: Tensor) -> Tensor:
        """From 0 to 1 where the window before `place` gives way to it."""
        first, last = self.starts[place] * unit, (self.starts[place - 1] + self.side) * unit
        length = max(1.0, self.overlap * unit / 4)
        return ((places - (first + last) / 2) / length + 0.5).clamp(0, 1)


class _InWindow:
    """A source that gives each tile its part of numbers that are drawn once, for the whole image."""

    def __init__(self, source: Source, size: tuple[int, int]) -> None:
        self._source, self._size = source, size
        self._drawn: list[Tensor] = []
        self._window: Window = (slice(0), slice(0))
        self._next = 0

    def at(self, rows: slice, columns: slice) -> "_InWindow":
        """From here on for this tile."""
        self._window, self._next = (rows, columns), 0
        return self

    def take(self, shape: tuple[int, ...], high: int | None) -> Tensor:
        """Numbers of the tile's shape (..., h, w), in latents.

        Raises:
            ValueError: another shape: then what an adapter draws belongs to no place, and it cannot encode in tiles.
        """
        sides = tuple(part.stop - part.start for part in self._window)
        if shape[-2:] != sides:
            raise ValueError(f"a tile of {sides} latents draws {shape}: set vae_tile to null for this pipeline")
        if self._next == len(self._drawn):
            self._drawn.append(draw((*shape[:-2], *self._size), self._source, high))
        self._next += 1
        return self._drawn[self._next - 1][..., self._window[0], self._window[1]]

    def rows(self, rows: slice) -> Source:
        """All there are: images are encoded one by one."""
        return self


def _spread(last: int, count: int) -> list[int]:
    """`count` whole numbers from 0 to `last`, evenly spaced."""
    return [0] if count == 1 else [place * last // (count - 1) for place in range(count)]


def _times(part: slice, unit: int) -> slice:
    return slice(part.start * unit, part.stop * unit)
