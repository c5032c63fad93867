"""How seconds and memory grow with what a user can turn up: group, batch, crop, tiles, and the size of an image.

    python tests/benchmarks/growth.py --size tiny
    python tests/benchmarks/growth.py --size middle --axis crop upscale
    python tests/benchmarks/growth.py --size sd21 --device cuda --output growth.md

Training steps and pipelines are those of `gdpo_step.py`. "a unit" is the cost of one output, one image or one pixel,
as a multiple of what the first row pays for it: 1 is linear, less is overhead that is shared, more is attention.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from _memory import held, unless_out_of_memory, working
from _meter import timed
from _rows import Rows
from _setup import (
    Ours,
    common_arguments,
    complete,
    make_adapter,
    method_of,
    precision,
    prepare_adapter,
    set_up,
    weights,
)
from _sizes import images, vgg_file

from rewardsr.adapters.osediff import OSEDiff
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.evaluation.upscale import upscale_tensor

AXES = ("group", "batch", "crop", "upscale", "tile", "tile_batch")
SCALES = (0.5, 0.75, 1, 1.5, 2)  # of the crop; 256 to 1024 pixels at SD 2.1's size
SIDES = (1, 1.5, 2, 3, 4)  # of images to upscale, in crops; 512 to 2048 pixels
DEPARTS = 1.1  # a unit costs so many times the least before it: growth is more than linear
Cost = tuple[float, int] | None  # seconds and working bytes; None: there was not enough memory


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.add_argument("--axis", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument("--form", help="of the trainer, see _setup.py")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up")
    chosen = parser.parse_args()
    usual = complete(chosen)
    chosen.form = chosen.form or usual[-1]
    return chosen


class Growth:
    """Measures along one axis after the other.

    Args:
        chosen: the command line.
        rows: where to write.
        adapter: with a LoRA.
    """

    def __init__(self, chosen: argparse.Namespace, rows: Rows, adapter: Any) -> None:
        self._chosen, self._rows, self._adapter = chosen, rows, adapter
        self._device = torch.device(chosen.device)

    def train(self, axis: str, values: Sequence[int], power: int = 1) -> None:
        """A training step for each value of a setting; a unit is value^power."""
        self._table(axis, {value: value**power for value in values}, lambda value: self._training(axis, value))

    def upscale(self, sides: Sequence[int], tile: int) -> None:
        """Images of these sides, whole and in tiles, and from where on tiles pay."""
        whole, tiled = (
            self._table(
                f"upscale, {'tiles' if side else 'whole'}",
                {length: length**2 for length in sides},
                lambda length, side=side: self._upscaling(length, tile=side, tile_overlap=tile // 4),
            )
            for side in (None, tile)
        )
        for what, place in (("time", 0), ("memory", 1)):
            pay = [side for side in sides if _saves(whole[side], tiled[side], place)]
            self._rows.say(f"tiles of {tile} latents save {what} at: {', '.join(map(str, pay)) or 'no side'}")

    def tiles(self, axis: str, values: Sequence[int], side: int, **others: int) -> None:
        """One image for each value of an option of tiles; a unit is the image."""
        self._table(
            f"upscale, {side} pixels, {axis}",
            dict.fromkeys(values, 1),
            lambda value: self._upscaling(side, **{axis: value}, **others),
        )

    def _table(self, name: str, units: dict[int, int], measure: Callable[[int], Cost]) -> dict[int, Cost]:
        found: dict[int, Cost] = {}
        prices: list[list[float]] = [[], []]
        self._rows.head(name, "seconds", "a unit", "working GiB", "a unit")
        for value, unit in units.items():
            cost = found[value] = measure(value)
            if cost is None:
                self._rows.row(str(value), "out of memory", "", "", "")
                continue
            for own, spent in zip(prices, cost, strict=True):
                own.append(spent / unit)
            shares = [own[-1] / own[0] if own[0] else 1.0 for own in prices]
            gib = f"{cost[1] / 2**30:.3f}"
            self._rows.row(str(value), f"{cost[0]:.4f}", f"{shares[0]:.2f}", gib, f"{shares[1]:.2f}")
        reached = [value for value, cost in found.items() if cost]
        for what, own in zip(("seconds", "memory"), prices, strict=True):
            dear = [
                value
                for value, price, before in zip(reached[1:], own[1:], accumulate(own, min), strict=False)
                if price > DEPARTS * before
            ]
            if len(own) > 1 and own[0]:
                where = f"more than linear from {dear[0]} on" if dear else "linear or less"
                self._rows.say(f"{what} a unit, last to first: {own[-1] / own[0]:.2f} ({where})")
        return found

    def _cost(self, work: Callable[[], Any]) -> Cost:
        """Seconds (median, after one that warms up) and working memory."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of other shapes

        def costs() -> tuple[float, int]:
            work()
            seconds = statistics.median(timed(work, self._device) for _ in range(self._chosen.steps))
            return seconds, working(work, self._device)

        return unless_out_of_memory(costs, self._device)

    def _training(self, axis: str, value: int) -> Cost:
        chosen = argparse.Namespace(**{**vars(self._chosen), axis: value})
        method = method_of(self._adapter, chosen, chosen.form)
        return self._cost(Ours(set_up(self._adapter, method, chosen, getattr(chosen, "batch", 1))).step)

    def _upscaling(self, side: int, **options: int | None) -> Cost:
        adapter = self._adapter
        before, adapter.tiling = adapter.tiling, OSEDiff.Options(**options).tiling()
        lq = images(1, side // adapter.scale, 0)
        batch = Batch(lq=lq, prompts=("a photo",), extras={"ram": torch.zeros(1, 145, 512)})
        try:
            return self._cost(lambda: upscale_tensor(adapter, batch, generator=Draws(0, 0, [0], "upscale")))
        finally:
            adapter.tiling = before


def _saves(whole: Cost, tiled: Cost, place: int) -> bool:
    """Whether tiles cost clearly less, or are all there is memory for."""
    return tiled is not None and (whole is None or DEPARTS * tiled[place] < whole[place])


def main(folder: Path) -> None:
    """Measure along all axes; the folder is for files of random weights."""
    chosen = arguments()
    chosen.vgg = vgg_file(folder, chosen.size) if chosen.trainer == "rfsr" else None
    device, dtype, rows = torch.device(chosen.device), precision(chosen), Rows(chosen.output)
    adapter = make_adapter(chosen, device, dtype)
    prepare_adapter(adapter, chosen)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows.say(f"\n{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}")
    rows.say(
        f"{chosen.trainer} on {chosen.adapter}, {chosen.form}, {chosen.size}; crop {chosen.crop}, group {chosen.group}"
    )
    rows.say(f"weights: {held(weights(adapter)) / 2**30:.3f} GiB")
    growth, crop = Growth(chosen, rows, adapter), chosen.crop
    tile = crop // adapter.compression  # in latents: what the networks know
    tiling = {"tile": tile, "tile_overlap": tile // 4}
    for axis in chosen.axis:
        if axis == "group" and chosen.trainer == "gdpo":
            growth.train("group", (2, 4, 6, 8, 12))
        elif axis == "batch":
            growth.train("batch", (1, 2, 4))
        elif axis == "crop":
            growth.train("crop", [int(crop * scale) // 16 * 16 for scale in SCALES], 2)
        elif axis == "upscale":
            growth.upscale([int(crop * scale) for scale in SIDES], tile)
        elif axis == "tile":
            growth.tiles("tile", [int(tile * scale) for scale in SCALES], 4 * crop, tile_overlap=tile // 4)
        elif axis == "tile_batch":
            growth.tiles("tile_batch", (1, 2, 4, 8), 4 * crop, **tiling)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
