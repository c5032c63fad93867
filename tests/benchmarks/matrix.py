"""What a step costs for every adapter and trainer, on the tiny networks of the tests, and how long each adapter is.

    python tests/benchmarks/matrix.py

Seconds of undisturbed steps (median, after one that warms up) on one CPU thread: they compare code paths, and say
nothing of networks of real size. The runs are those of `test_matrix.py`: batches of two crops of 32 pixels.
"""

import argparse
import inspect
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # where the rows are, and the tagger that one of them names

from _matrix import CROP, ROWS, SAMPLER, TRAINERS, Row, bases, recipe  # noqa: E402

from rewardsr.options import parse  # noqa: E402
from rewardsr.plugins import names, resolve  # noqa: E402
from rewardsr.train import loop  # noqa: E402
from rewardsr.train import recipe as recipes  # noqa: E402
from rewardsr.train.checkpoint import State  # noqa: E402
from rewardsr.train.optimiser import make_optimiser  # noqa: E402
from rewardsr.train.prepare import set_up  # noqa: E402


def seconds(row: Row, trainer: str, base: str, steps: int) -> float | None:
    """Median of a step; None where the trainer refuses the adapter."""
    if trainer in row.refused_by:
        return None
    with tempfile.TemporaryDirectory() as folder:
        content = recipe(row, trainer, base, Path(folder), steps=steps + 1)
        setup = set_up(parse(recipes.Recipe, content, "benchmark"))
        optimiser, state, taken = make_optimiser(setup), State(), list[float]()
        for _ in range(steps + 1):
            began = time.perf_counter()
            loop.step(setup, optimiser, state)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def lines(adapter: str) -> tuple[str, int]:
    """Name and length of the file that an adapter is written in, every line counted."""
    path = Path(inspect.getsourcefile(resolve("adapters", adapter)) or "")
    return path.name, len(path.read_text().splitlines())


def table(rows: list[list[str]]) -> None:
    """Print rows, the first of them the header, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = [["seconds a step", *TRAINERS]]
    with tempfile.TemporaryDirectory() as folder:
        places = bases(Path(folder))
        for row in ROWS:
            cells = [seconds(row, trainer, places[row.base], chosen.steps) for trainer in TRAINERS]
            found.append([row.name, *("refused" if cell is None else f"{cell:.3f}" for cell in cells)])
    print(f"torch {torch.__version__}, 1 thread, float32, 2 crops of {CROP} pixels, samplers of {SAMPLER} steps\n")
    table(found)
    print()
    table([["adapter", "file", "lines, all counted"], *([name, *map(str, lines(name))] for name in names("adapters"))])


if __name__ == "__main__":
    main()
