"""Peak memory of `rewardsr upscale` against the size of its output: the command itself, a process for each size.

    OMP_NUM_THREADS=1 python tests/benchmarks/upscale_memory.py [--base BASE] [--color-fix wavelet] 512 2048 8192x2048

Sizes are of the output, in pixels, width by height or a side; the image is a photograph of the demo, repeated. Prints a
Markdown table: the size, peak resident memory, what the output takes in float32, and seconds, start of Python and all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import rewardsr.demo

PHOTOS = Path(rewardsr.demo.__file__).parent / "photographs" / "held_out"
SCALE = 4


def image(width: int, height: int) -> Image.Image:
    """An LQ image for an output of this size."""
    photo = np.asarray(Image.open(min(PHOTOS.iterdir())).convert("RGB"))
    rows, columns = -(-height // SCALE), -(-width // SCALE)
    times = (-(-rows // photo.shape[0]), -(-columns // photo.shape[1]), 1)
    return Image.fromarray(np.tile(photo, times)[:rows, :columns])


def measure(lq: Path, out: Path, base: str, color_fix: str) -> tuple[float, float]:
    """Peak MiB and seconds of the command on one image.

    Raises:
        RuntimeError: it has failed.
    """
    command = [sys.executable, "-m", "rewardsr", "upscale", str(lq), "-o", str(out), "--base", base, "--device", "cpu"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--color-fix", color_fix], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"'{' '.join(command)}' has failed")
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    """Measure the sizes one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", metavar="SIDE or WIDTHxHEIGHT")
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--color-fix", default="none")
    given = parser.parse_args()
    print("| output, px | peak RSS, MiB | the output in float32, MiB | seconds |\n|---|---|---|---|", flush=True)
    for size in given.sizes:
        width, _, height = size.partition("x")
        sides = int(width), int(height or width)
        with tempfile.TemporaryDirectory() as folder:
            image(*sides).save(Path(folder, "lq.png"))
            peak, seconds = measure(Path(folder, "lq.png"), Path(folder, "out"), given.base, given.color_fix)
        pixels = sides[0] * sides[1]
        print(f"| {sides[0]}x{sides[1]} | {peak:,.0f} | {pixels * 12 / 2**20:,.0f} | {seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
