"""The curves of a page as PNGs, by matplotlib."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewardsr.errors import UserError
from rewardsr.evaluation.page.content import RunView, distinct
from rewardsr.evaluation.page.curves import charts
from rewardsr.storage import check_folder, write_folder

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08900", "#4aa3df", "#8a5a00", "#7a7a7a")  # as in curves.js


def check_plots(folder: Path) -> None:
    """Refuse what `write_plots` could not do, before any work.

    Raises:
        UserError: matplotlib is not installed, or the folder holds something.
    """
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib, which is not installed: pip install 'rewardsr[plots]'")
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty: choose a new folder for the plots")


def write_plots(folder: Path, runs: Sequence[RunView]) -> list[Path]:
    """Write a PNG for each curve of the page to a new or empty folder, in one step; returns them.

    Raises:
        UserError: as `check_plots`, there is nothing to draw, or the place cannot be written to.
    """
    check_plots(folder)
    found = charts(runs)
    if not found:
        raise UserError("nothing to plot: the runs have no metrics")
    titles = [re.sub(r"[^\w.-]+", "-", chart["title"]).strip("-.")[:80] or "metric" for chart in found]
    names = [name.replace(" ", "") + ".png" for name in distinct(titles)]

    def fill(place: Path) -> None:
        for name, chart in zip(names, found, strict=True):
            _draw(chart, runs, place / name)

    write_folder(folder, fill, replace=True)
    return [folder / name for name in names]


def _draw(chart: dict[str, Any], runs: Sequence[RunView], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for series in chart["series"]:
        colour = COLOURS[series["run"] % len(COLOURS)]
        steps, values = ([point[place] for point in series["points"]] for place in (0, 1))
        mark = "o" if len(steps) < 40 else ""
        axes.plot(steps, values, color=colour, marker=mark, markersize=3, label=_plain(runs[series["run"]].name))
        banded = [point for point in series["points"] if len(point) == 4]
        if banded:
            at, _, low, high = zip(*banded, strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        if "base" in series:
            axes.axhline(series["base"], color=colour, linestyle="--", linewidth=1)
    axes.set_xlabel("step")
    axes.set_title(_plain(chart["title"]), fontsize=11)
    axes.set_ylabel(_plain(chart["meaning"]), fontsize=8, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _plain(text: str) -> str:
    """Without what matplotlib takes for mathematics."""
    return text.replace("$", r"\$")
