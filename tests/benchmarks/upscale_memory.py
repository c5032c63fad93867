"""Peak memory of `rewardsr upscale` against the size of its output, each size in a process of its own.

    python tests/benchmarks/upscale_memory.py [--base BASE] [--color-fix wavelet] 512 1024 2048 4096 8192

Without `--base` on the tiny pipeline of the tests, whose tiles take next to nothing: what is left is what grows with
the image. Prints a Markdown table: pixels a side, peak resident memory, how much of that was not there before,
what one float32 image of that size takes, and the seconds.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def measure(base: str, side: int, color_fix: str) -> None:
    """Upscale one image to `side`, and print what it took."""
    import rewardsr
    from rewardsr.testing import tiny_pipeline

    with tempfile.TemporaryDirectory() as folder:
        made = str(tiny_pipeline(Path(folder, "base"))) if base == "tiny" else base
        adapter = rewardsr.load_adapter("osediff", made, scale=4)
        ramp = np.linspace(0, 255, side // 4).astype(np.uint8)
        picture = np.stack(
            [np.add.outer(ramp // 2, ramp // 2), np.tile(ramp, (side // 4, 1)), np.full_like(ramp, 9) + ramp[:, None]],
            -1,
        )
        Image.fromarray(picture).save(Path(folder, "lq.png"))
        rewardsr.upscale(adapter, picture[:8, :8], Path(folder, "small"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        rewardsr.upscale(adapter, Path(folder, "lq.png"), Path(folder, "out"), color_fix=color_fix)
        took = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {side} | {peak:,.0f} | {peak - before:,.0f} | {side**2 * 12 / 2**20:,.0f} | {took:,.0f} |")


def main() -> None:
    """Measure the sizes one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", type=int)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--color-fix", default="none")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        measure(given.base, given.sides[0], given.color_fix)
        return
    print(
        "| output, px a side | peak RSS, MiB | beyond the start | one float32 image | seconds |\n|---|---|---|---|---|",
        flush=True,
    )
    for side in given.sides:
        command = [sys.executable, __file__, str(side), "--base", given.base, "--color-fix", given.color_fix, "--here"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
