"""What a GDPO step costs, part by part: seconds, operations, memory, and how near that is to what the maths needs.

    python tests/benchmarks/gdpo_step.py --size tiny
    python tests/benchmarks/gdpo_step.py --size sd21 --device cuda --batch 1 --compile
    python tests/benchmarks/gdpo_step.py --size sd21 --count-only      (operations only: any CPU, no memory)

Networks have random weights, which changes no cost. The step is the real one, `rewardsr.train.loop.step`, with its
calls wrapped. Operations are counted by torch (2 per multiply-add; convolutions and matrix products) on the meta
device; those of rewards are not counted, and their time is listed apart.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from _meter import PARTS, REST, REWARDS, Meter, floor, matmul_rate, medians, on_meta, unit_flops, watched
from _sizes import PARAMETERS, images, parameter_counts, pipeline
from accelerate import Accelerator

from rewardsr import lora
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.options import parse
from rewardsr.rewards import build
from rewardsr.train import loop
from rewardsr.train import recipe as recipes
from rewardsr.train.checkpoint import State
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import Setup
from rewardsr.trainers.gdpo import GDPO, GDPOOptions

SCALE = 4
RELEASED = 73_807  # GFLOP of GDPO-SR's released step: SD 2.1-base, 512 px, G = 6, batch 1


class Images:
    """Endless crops, each with a prompt of its own, as in a first epoch with one caption an image."""

    def __init__(self, crop: int, fixed_prompt: bool) -> None:
        self._crop, self._fixed = crop, fixed_prompt

    def batch(self, seed: int, indices: list[int]) -> Batch:
        """The crops of these indices."""
        hq = images(len(indices), self._crop, seed + indices[0])
        lq = torch.nn.functional.interpolate(hq, scale_factor=1 / SCALE, mode="area")
        prompts = tuple("a photo" if self._fixed else f"photo {index}" for index in indices)
        return Batch(lq=lq, hq=hq, prompts=prompts)

    def prefetch(self, seed: int, batches: Iterable[list[int]]) -> None:
        """Nothing to load."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["tiny", "sd21"], default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--crop", type=int, help="HQ pixels a side; default 512, tiny: 64")
    parser.add_argument("--preference", choices=["paper", "conditional"], default="paper")
    parser.add_argument("--shared-noise", action="store_true")
    parser.add_argument("--rewards", default="psnr,detail", help="comma-separated; pyiqa's need their weights")
    parser.add_argument("--fixed-prompt", action="store_true", help="one prompt for all images: encoded once, ever")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="measured, after two that warm up")
    parser.add_argument("--count-only", action="store_true", help="operations only, on the meta device")
    chosen = parser.parse_args()
    chosen.crop = chosen.crop or (512 if chosen.size == "sd21" else 64)
    return chosen


def options_of(chosen: argparse.Namespace) -> GDPOOptions:
    """The method's options."""
    return GDPOOptions(
        group_size=chosen.group,
        preference=chosen.preference,
        shared_noise=chosen.shared_noise,
        micro_batch=chosen.micro_batch,
    )


def count(chosen: argparse.Namespace) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Operations of a real step by part, of the maths by part, and the networks' parameters; needs no memory."""
    adapter = pipeline(chosen.size, torch.device("meta"), torch.float32, fingerprint=False)
    counts = parameter_counts(adapter)
    lora.attach(adapter)
    units = unit_flops(adapter, chosen.crop)
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    rewards = {"psnr": build("psnr")}
    method = GDPO(adapter, rewards, {"psnr": 1.0}, options_of(chosen))
    indices = list(range(chosen.batch))
    meter = Meter(torch.device("cpu"), count=True)
    with watched(adapter, method, meter, on_meta(adapter)):
        group = method.prepare(Images(chosen.crop, False).batch(0, indices), Draws(0, 0, indices, "group"))
        for loss in method.losses(group, Draws(0, 0, indices, "update-0")):
            loss.value.backward()
    needed = floor(units, chosen.batch, chosen.group, chosen.preference, chosen.shared_noise)
    return {part: meter.flops[part] for part in PARTS if part in meter.flops}, needed, counts


def real_setup(chosen: argparse.Namespace) -> tuple[Setup, torch.dtype]:
    """A run's set-up as `rewardsr.train.prepare` would make it, on networks that were never in a file."""
    device = torch.device(chosen.device)
    bf16 = chosen.precision == "bf16" or (chosen.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    adapter = pipeline(chosen.size, device, dtype)
    lora.attach(adapter)
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    if chosen.compile:
        torch._dynamo.config.cache_size_limit = 64  # policy and reference, one image and a group: variants of a graph
        for module in (adapter.unet, adapter.vae.encoder, adapter.vae.decoder):
            module.compile()
    names = [name for name in chosen.rewards.split(",") if name]
    content: dict[str, Any] = {
        "base": "random",
        "output": "nowhere",
        "data": {"train": "random", "crop": chosen.crop},
        "rewards": [{"name": name} for name in names],
        "trainer_options": options_of(chosen).model_dump(),
        "steps": 1_000_000,
        "batch_size": chosen.batch,
        "gradient_checkpointing": chosen.gradient_checkpointing,
    }
    method = GDPO(adapter, {name: build(name) for name in names}, dict.fromkeys(names, 1.0), options_of(chosen))
    return Setup(
        recipe=parse(recipes.Recipe, content, "benchmark"),
        accelerator=Accelerator(cpu=device.type == "cpu"),
        adapter=adapter,
        method=method,
        data=Images(chosen.crop, chosen.fixed_prompt),  # type: ignore[arg-type]
        validation=None,
        metrics=method.rewards,
        notes=(),
    ), dtype


def measure(chosen: argparse.Namespace, setup: Setup) -> SimpleNamespace:
    """Seconds of undisturbed steps, and by part; memory at its peak, in all and by part."""
    device, adapter, method = torch.device(chosen.device), setup.adapter, setup.method
    optimiser, state = make_optimiser(setup), State()
    cuda = device.type == "cuda"

    def step() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        loop.step(setup, optimiser, state)
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    for _ in range(2):
        step()
    warm_up = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    whole = statistics.median(step() for _ in range(chosen.steps))
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    meter, runs = Meter(device), []
    assert isinstance(method, GDPO)
    with watched(adapter, method, meter):
        for _ in range(chosen.steps):
            meter.begin()
            loop.step(setup, optimiser, state)
            runs.append(meter.end())
    return SimpleNamespace(warm_up=warm_up, whole=whole, peak=peak, parts=medians(runs), peaks=meter.peak)


def report(
    chosen: argparse.Namespace, counted: dict[str, int], needed: dict[str, int], found: Any, rate: float | None
) -> None:
    """The table, as Markdown."""
    header = ["part", "GFLOP", "needed"] + ([] if found is None else ["seconds", "TFLOP/s", "of matmul", "peak GiB"])
    rows = []
    for part in PARTS if found is None else (*PARTS, REWARDS, REST):
        row = [part, f"{counted.get(part, 0) / 1e9:,.2f}", f"{needed.get(part, 0) / 1e9:,.2f}"]
        if part in (REWARDS, REST):
            row[1:] = ["", ""]
        if found is not None:
            seconds = found.parts.get(part, 0.0)
            speed = counted.get(part, 0) / seconds / 1e12 if seconds else 0.0
            share = f"{speed / rate:.0%}" if rate and part in counted else ""
            row += [f"{seconds:.4f}", f"{speed:.3f}" if part in counted else "", share]
            row.append(f"{found.peaks[part] / 2**30:.2f}" if part in found.peaks else "")
        rows.append(row)
    total, least = sum(counted.values()), sum(needed.values())
    row = ["**step, rewards apart**", f"{total / 1e9:,.2f}", f"{least / 1e9:,.2f}"]
    if found is not None:
        seconds = sum(found.parts.get(part, 0.0) for part in PARTS)
        share = f"{total / seconds / 1e12 / rate:.0%}" if rate else ""
        row += [f"{seconds:.4f}", f"{total / seconds / 1e12:.3f}", share, ""]
    widths = [max(len(line[column]) for line in (header, *rows, row)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *rows, row):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print(f"\noperations counted / needed: {total / least:.4f}")
    if (chosen.size, chosen.crop, chosen.group, chosen.batch) == ("sd21", 512, 6, 1):
        print(f"GDPO-SR's released step: {RELEASED:,} GFLOP; this one does {total / 1e9 / RELEASED:.0%} of that")
    if found is not None:
        print(f"undisturbed step, rewards and optimiser included: {found.whole:.4f} s (warm-up {found.warm_up:.1f} s)")
        kind = "allocated" if chosen.device.startswith("cuda") else "resident, the process's whole life"
        print(f"peak memory ({kind}): {found.peak / 2**30:.2f} GiB")


def main() -> None:
    """Count, then measure."""
    chosen = arguments()
    counted, needed, parameters = count(chosen)
    print(f"parameters: {', '.join(f'{name} {number:,}' for name, number in parameters.items())}")
    if chosen.size == "sd21" and parameters != PARAMETERS:
        raise SystemExit(f"these are not Stable Diffusion 2.1's sizes: {PARAMETERS}")
    found, rate = None, None
    if not chosen.count_only:
        setup, dtype = real_setup(chosen)
        found = measure(chosen, setup)
        rate = matmul_rate(torch.device(chosen.device), dtype)
        name = torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else "CPU"
        print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}: {rate:.2f} TFLOP/s")
    report(chosen, counted, needed, found, rate)


if __name__ == "__main__":
    main()
