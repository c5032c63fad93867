"""How fast degradations are: images a second and processor time at 512 pixels of HQ, by batch and threads of torch's.

    python tests/benchmarks/degrade.py
    python tests/benchmarks/degrade.py --degradations realesrgan --batches 1 8 --device cuda

A crop of a photograph is degraded with one generator after another. Training runs batches of one image in several
threads with one of torch's each, beside the step: loader.py measures that, decoding included.
"""

import argparse
import os
import statistics
import time

import torch
from torch.nn.functional import interpolate

from rewardsr.data.degrade.contract import Degradation, make_degradation
from rewardsr.data.images import read_image
from rewardsr.demo.photos import HELD_OUT
from rewardsr.train.recipe import DegradationRecipe

CROP, SCALE = 512, 4


def measure(degradation: Degradation, hq: torch.Tensor, images: int) -> tuple[float, float]:
    """Images a second in the median call, and processor seconds an image, which others on the machine hardly change."""
    calls = []
    busy = 0.0
    for first in range(0, images + len(hq), len(hq)):
        generators = [torch.Generator().manual_seed(first + place) for place in range(len(hq))]
        began = time.perf_counter(), time.process_time()
        degradation(hq, generators).cpu()  # waits for the device
        if first:  # the first call finds no tables
            calls.append(time.perf_counter() - began[0])
            busy += time.process_time() - began[1]
    return len(hq) / statistics.median(calls), busy / (len(calls) * len(hq))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--degradations", nargs="+", default=["realesrgan", "light", "bicubic"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=64, help="for each figure")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    photo = interpolate(read_image(HELD_OUT / "coffee.png")[None], (CROP, CROP), mode="bicubic", antialias=True).clamp(
        0, 1
    )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, HQ of {CROP}x{CROP}, {chosen.device}\n")
    print("| degradation | threads | batch | images/s | CPU s an image |\n|---|---|---|---|---|")
    for name in chosen.degradations:
        degradation = make_degradation(DegradationRecipe(name=name), SCALE)
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            for batch in chosen.batches:
                hq = photo.repeat(batch, 1, 1, 1).to(chosen.device)
                rate, busy = measure(degradation, hq, chosen.images)
                print(f"| {name} | {threads} | {batch} | {rate:.1f} | {busy:.3f} |", flush=True)


if __name__ == "__main__":
    main()
