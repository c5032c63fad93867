"""One setting of a pipeline at several values: scores, a curve and pictures, to choose from."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from rewardsr.data.images import read_image
from rewardsr.errors import UserError
from rewardsr.evaluation.comparison import unsigned
from rewardsr.evaluation.evaluate import evaluate
from rewardsr.evaluation.pictures import Cell, closeup, write_grid
from rewardsr.evaluation.report import Evaluation, mean_of
from rewardsr.evaluation.results import HQ, LQ
from rewardsr.evaluation.systems import System
from rewardsr.run_folder import PICTURES
from rewardsr.storage import expand, write_text

CURVE, GRID = "curve.svg", "grid.png"
ROWS, SIDE, ZOOM = 4, 128, 2  # images in the grid, pixels of each that are shown, and how much larger

# Of the curves, in pixels: a panel, what it leaves at its left, top, right and bottom, and panels in a row.
_WIDE, _TALL, _LEFT, _TOP, _RIGHT, _BOTTOM, _IN_A_ROW = 340, 220, 70, 34, 18, 34, 3


def sweep(systems: Mapping[str, System], data: Path | str, output: Path | str, **options: Any) -> Evaluation:
    """`evaluate` on one setting at several values, and two pictures beside its tables.

    `curve.svg` has a panel for each metric: its mean at every value, with the interval of the difference to the first
    value. `grid.png` has the first images at every value, cut to where HQ has most detail.

    Args:
        systems: by `setting=value`, in the order of the curve (see `rewardsr.evaluation.asked.variants`).
        data: as of `evaluate`.
        output: folder, as of `evaluate`.
        options: all others of `evaluate`.

    Raises:
        UserError: as `evaluate`; or there is one value alone.
    """
    if len(systems) < 2:
        raise UserError("a sweep needs two values at least")
    found = evaluate(systems, data, output=output, **options)
    folder = expand(output)
    write_text(folder / CURVE, curves(found))
    write_grid(_rows(found, folder / PICTURES), folder / GRID)
    return found


def curves(found: Evaluation) -> str:
    """The metrics of a sweep over its values, as SVG; values that are numbers are spaced as such."""
    names = [*found.metrics, *found.sets.get(found.first, {})]
    setting = found.first.partition("=")[0]
    values = [system.partition("=")[2] for system in found.scores]
    places = _numbers(values)
    rows = -(-len(names) // _IN_A_ROW)
    width, height = _WIDE * min(len(names), _IN_A_ROW), _TALL * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, metric in enumerate(names):
        left, top = number % _IN_A_ROW * _WIDE, number // _IN_A_ROW * _TALL
        parts += [f'<g transform="translate({left} {top})">', *_panel(found, metric, setting, values, places), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(found: Evaluation, metric: str, setting: str, values: Sequence[str], places: Sequence[float]) -> list[str]:
    means = [mean_of(found, system, metric) for system in found.scores]
    bars = [_bar(found, system, metric) for system in found.scores]
    lowest, highest = (edge([end for bar in bars for end in bar]) for edge in (min, max))
    across = _axis(min(places), max(places), _LEFT, _WIDE - _RIGHT)
    upward = _axis(lowest, highest, _TALL - _BOTTOM, _TOP)
    better = "lower" if metric in found.negated else "higher"
    parts = [
        f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(metric)} ({better} is better)</text>',
        f'<path d="M{_LEFT - 8} {_TOP}V{_TALL - _BOTTOM + 8}H{_WIDE - _RIGHT}" fill="none" stroke="#999"/>',
        *(
            f'<text x="{_LEFT - 12}" y="{upward(end) + 4:.1f}" text-anchor="end">{unsigned(end)}</text>'
            for end in dict.fromkeys((lowest, highest))
        ),
        f'<text x="{_WIDE - _RIGHT}" y="18" text-anchor="end" fill="#555">over {escape(setting)}</text>',
    ]
    points = [(across(place), upward(mean)) for place, mean in zip(places, means, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    for (x, y), (low, high), value in zip(points, bars, values, strict=True):
        parts += [
            f'<path d="M{x:.1f} {upward(low):.1f}V{upward(high):.1f}" stroke="#1f5fa8" stroke-opacity="0.4"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f5fa8"/>',
            f'<text x="{x:.1f}" y="{_TALL - 10}" text-anchor="middle">{escape(value)}</text>',
        ]
    return parts


def _bar(found: Evaluation, system: str, metric: str) -> tuple[float, float]:
    """Ends of the interval of a value's difference to the first one, from the first one's mean."""
    own = mean_of(found, system, metric)
    comparison = found.comparisons.get(system, {}).get(metric)
    if comparison is None or len(found.images) == 1:
        return own, own
    sign, start = found.shown(metric), mean_of(found, found.first, metric)
    low, high = sorted((start + sign * comparison.low, start + sign * comparison.high))
    return low, high


def _axis(first: float, last: float, start: int, end: int) -> Any:
    """Where a value lies on an axis, in pixels."""
    span = last - first
    return lambda value: (start + end) / 2 if not span else start + (end - start) * (value - first) / span


def _numbers(values: Sequence[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError:  # words stand beside each other
        return [float(place) for place in range(len(values))]


def _rows(found: Evaluation, pictures: Path) -> list[list[Cell]]:
    """LQ enlarged | every value | HQ, of the first images."""
    rows = []
    for image in found.images[:ROWS]:
        file = f"{Path(image).stem}.png"
        made = {system: read_image(pictures / system / file) for system in found.scores}
        size = next(iter(made.values())).shape[-2:]
        lq = F.interpolate(read_image(pictures / LQ / file)[None], size=size, mode="bicubic", antialias=True)[0]
        hq = {"HQ": read_image(pictures / HQ / file)} if (pictures / HQ / file).is_file() else {}
        rows.append(closeup([(f"{Path(image).stem} LQ", lq), *made.items(), *hq.items()], SIDE, ZOOM))
    return rows
