"""Whether data keeps up with a step: images a second, and steps that wait for theirs, by threads and batch.

    python tests/benchmarks/loader.py
    python tests/benchmarks/loader.py --degradation realesrgan --workers 0 4 8 --batches 4 8 --step 0.3 --images 64

Photo-like PNGs of 2040x1356 pixels are written to a temporary folder; crops of 512 pixels of them are degraded. With
`--layout` they are not a folder but a list of paths, pairs (with LQ images beside them), or a table of the package
`datasets`. Nothing is kept decoded, as on a data set that is larger than the cache; the system may well keep the files.
The step is a pause, as a step on a card is for the processor.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewardsr.data.degrade.contract import Degradation, make_degradation
from rewardsr.data.folder import open_data
from rewardsr.data.loader import default_workers
from rewardsr.train.recipe import DegradationRecipe, SourceRecipe

WIDTH, HEIGHT, CROP, SCALE = 2040, 1356, 512, 4


def write_photos(folder: Path, number: int) -> float:
    """Write PNGs with structure and some noise; returns megabytes of one."""
    for index in range(number):
        random = np.random.default_rng(index)
        coarse = random.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        noisy = smooth + random.normal(0, 3, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.png")
    return sum(path.stat().st_size for path in folder.iterdir()) / number / 1e6


def laid_out(folder: Path, layout: str) -> SourceRecipe:
    """The images in `folder/gt` in one of the layouts, all of them within `folder`."""
    images = sorted((folder / "gt").iterdir())
    if layout == "list":
        (folder / "list.txt").write_text("".join(f"gt/{path.name}\n" for path in images))
        return SourceRecipe(path=str(folder / "list.txt"))
    if layout == "table":
        import datasets

        rows = [{"bytes": path.read_bytes(), "path": None} for path in images]
        table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
        table.save_to_disk(folder / "table")
        return SourceRecipe(dataset=str(folder / "table"))
    if layout == "pairs":
        (folder / "lq").mkdir()
        for path in images:
            Image.open(path).reduce(SCALE).save(folder / "lq" / path.name)
    return SourceRecipe(path=str(folder), layout="pairs" if layout == "pairs" else "hq")


def measure(
    source: SourceRecipe, degradation: Degradation, workers: int, batch: int, pause: float, steps: int
) -> tuple[float, float, float]:
    """Images a second without pauses, processor seconds an image, and the median wait of a step of `pause` seconds."""
    found = []
    busy = time.process_time()
    for wait in (0.0, pause):
        data = open_data([source], scale=SCALE, crop=CROP, degradation=degradation, cache_mb=0, workers=workers)

        def stream(turn: int) -> range:
            return range(turn * batch, (turn + 1) * batch)

        waited = []
        began = 0.0
        for turn in range(steps + 1):
            if turn == 1:  # the first one finds nothing made ahead
                began = time.perf_counter()
            asked = time.perf_counter()
            data.batch(0, stream(turn))
            waited.append(time.perf_counter() - asked)
            data.prefetch(0, map(stream, count(turn + 1)))
            time.sleep(wait)
        found.append(steps * batch / (time.perf_counter() - began) if not wait else statistics.median(waited[1:]))
        data.close()
    return found[0], (time.process_time() - busy) / (2 * batch * (steps + 1)), found[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degradation", default="light")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--step", type=float, default=0.3, help="seconds")
    parser.add_argument("--steps", type=int, default=8, help="measured, after one")
    parser.add_argument("--layout", choices=["hq", "pairs", "list", "table"], default="hq")
    parser.add_argument("--images", type=int, default=24, help="files")
    chosen = parser.parse_args()
    degradation = make_degradation(DegradationRecipe(name=chosen.degradation), SCALE)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "gt").mkdir()
        size = write_photos(Path(name) / "gt", chosen.images)
        source = laid_out(Path(name), chosen.layout)
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads of torch's, "
            f"PNGs of {WIDTH}x{HEIGHT} and {size:.1f} MB, crops of {CROP}, {chosen.degradation}; threads by default: "
            f"{default_workers()}\n"
        )
        print(
            f"| threads | batch | images/s | CPU s an image | a step of {chosen.step} s waits |\n|---|---|---|---|---|"
        )
        for workers in chosen.workers:
            for batch in chosen.batches:
                rate, busy, wait = measure(source, degradation, workers, batch, chosen.step, chosen.steps)
                print(f"| {workers} | {batch} | {rate:.1f} | {busy:.3f} | {wait:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
