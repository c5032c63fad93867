"""What a training step costs, in all and part by part, and beside the step of the papers' released code.

    python tests/benchmarks/gdpo_step.py --size tiny
    python tests/benchmarks/gdpo_step.py --size middle --form paper conditional shared --against released
    python tests/benchmarks/gdpo_step.py --size sd21 --device cuda --batch 1 2 --against released --output rows.md
    python tests/benchmarks/gdpo_step.py --size sd21 --count-only      (operations only: any CPU, no memory)

Networks have random weights, which changes no cost. Our step is the real one, `rewardsr.train.loop.step`, with its
calls wrapped; the released one is `_released.py`, and the two are taken in turn, on the same networks. Operations are
counted by torch (2 per multiply-add; convolutions and matrix products) on the meta device; those of rewards are not
counted. Memory is what a step takes at its peak above what stays between steps ("working"), and both together; on the
CPU it is followed tensor by tensor.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _count import META, count_gdpo, gdpo_needs, gdpo_released, unit_flops
from _memory import held, working
from _meter import PARTS, REST, REWARDS, Meter, matmul_rate, medians, watched
from _released import GDPOSR
from _rows import Rows
from _setup import FORMS, Ours, Theirs, compile_networks, judge, method_of, precision, set_up
from _sizes import CROPS, PARAMETERS, SIZES, parameter_counts, pipeline

from rewardsr import lora

Counts = dict[str, int]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--form", choices=FORMS, nargs="+", default=["paper"], help="of the preference, one or several")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="one or several")
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--crop", type=int, help="HQ pixels a side; default 512, middle: 128, tiny: 64")
    parser.add_argument("--rewards", default="psnr,detail", help="comma-separated; pyiqa's need their weights")
    parser.add_argument("--fixed-prompt", action="store_true", help="one prompt for all images: encoded once, ever")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--against", choices=["released"], help="measure the released step in turn with ours")
    parser.add_argument("--steps", type=int, default=5, help="measured, after two that warm up")
    parser.add_argument("--no-parts", action="store_true", help="whole steps only")
    parser.add_argument("--no-count", action="store_true", help="no operations: starts a few seconds earlier")
    parser.add_argument("--count-only", action="store_true", help="operations only, on the meta device")
    parser.add_argument("--output", type=Path, help="append what is printed to this file")
    chosen = parser.parse_args()
    chosen.crop = chosen.crop or CROPS[chosen.size]
    return chosen


def total(counts: Counts) -> float:
    """GFLOP of all parts."""
    return sum(counts.values()) / 1e9


def report_counts(chosen: argparse.Namespace, rows: Rows) -> None:
    """What each real step does, counted call by call, and what its maths needs."""
    adapter = pipeline(chosen.size, META, torch.float32)
    parameters = parameter_counts(adapter)
    rows.say(f"parameters: {', '.join(f'{name} {number:,}' for name, number in parameters.items())}")
    if chosen.size == "sd21" and parameters != PARAMETERS:
        raise SystemExit(f"these are not Stable Diffusion 2.1's sizes: {PARAMETERS}")
    lora.attach(adapter)
    units = unit_flops(adapter, chosen.crop)
    for form in chosen.form:
        for batch in chosen.batch:
            needed = gdpo_needs(units, form, batch, chosen.group)
            counted = count_gdpo(adapter, chosen, form, batch)
            adapter.device = META
            released = gdpo_released(units, batch, chosen.group)
            rows.head(f"{form}, batch {batch}: GFLOP", "ours", "needed", "released")
            for part in dict.fromkeys([*needed, *counted, *released]):
                rows.row(part, *(f"{counts.get(part, 0) / 1e9:,.2f}" for counts in (counted, needed, released)))
            rows.row("**step, rewards apart**", *(f"{total(counts):,.2f}" for counts in (counted, needed, released)))


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def report_steps(
    chosen: argparse.Namespace, rows: Rows, runs: dict[str, Any], counts: dict[str, Counts], rate: float
) -> None:
    """Whole steps: those of all runs in turn, then a line for each, and what ours is of the other."""
    device, taken = torch.device(chosen.device), dict[str, list[float]]()
    for turn in range(chosen.steps + 2):
        for name, run in runs.items():
            seconds = timed(run.step, device)
            if turn > 1:
                taken.setdefault(name, []).append(seconds)
            rows.note(f"{'warm-up' if turn < 2 else 'step'} {turn}, {name}: {seconds:.4f} s")
    found: dict[str, tuple[float, ...]] = {}
    rows.head("step", "seconds", "fastest", "slowest", "working GiB", "in all GiB", "TFLOP", "of matmul")
    for name, run in runs.items():
        work = working(run.step, device)
        found[name] = (statistics.median(taken[name]), work, work + held(run.holds()))
        flops = total(counts[name]) if name in counts else None
        rows.row(
            name,
            *(f"{value:.4f}" for value in (found[name][0], min(taken[name]), max(taken[name]))),
            *(f"{value / 2**30:.3f}" for value in found[name][1:]),
            *(["", ""] if flops is None else [f"{flops / 1e3:.3f}", f"{flops / 1e3 / found[name][0] / rate:.0%}"]),
        )
    if len(found) == 2:
        ours, theirs = found.values()
        shares = [f"{mine / other:.3f}" for mine, other in zip(ours, theirs, strict=True)]
        rows.row("ours / released", shares[0], "", "", *shares[1:], "", "")
        rows.say(f"\nours is {theirs[0] / ours[0]:.2f} times as fast, in {shares[1]} of the working memory")


def report_parts(chosen: argparse.Namespace, rows: Rows, setup: Any, run: Ours, counts: Counts, rate: float) -> None:
    """Our step part by part; on CUDA the device is waited for at every border."""
    meter, found = Meter(torch.device(chosen.device)), []
    with watched(setup.adapter, setup.method, meter):
        for _ in range(chosen.steps):
            meter.begin()
            run.step()
            found.append(meter.end())
    seconds = medians(found)
    rows.head("ours, by part", "GFLOP", "seconds", "TFLOP/s", "of matmul", "peak GiB")
    for part in (*PARTS, REWARDS, REST):
        if part not in seconds:
            continue
        cells = ["", f"{seconds[part]:.4f}", "", ""]
        if part in counts:
            speed = counts[part] / seconds[part] / 1e12
            cells = [f"{counts[part] / 1e9:,.2f}", f"{seconds[part]:.4f}", f"{speed:.3f}", f"{speed / rate:.0%}"]
        rows.row(part, *cells, f"{meter.peak[part] / 2**30:.2f}" if part in meter.peak else "")


def main() -> None:
    """Count, or measure."""
    chosen = arguments()
    rows = Rows(chosen.output)
    if chosen.count_only:
        report_counts(chosen, rows)
        return
    device, dtype = torch.device(chosen.device), precision(chosen)
    units: Counts = {}
    if not chosen.no_count:
        bare = pipeline(chosen.size, META, torch.float32)
        lora.attach(bare)
        units = unit_flops(bare, chosen.crop)
    adapter = pipeline(chosen.size, device, dtype)
    second = copy.deepcopy(adapter.unet) if chosen.against else None
    lora.attach(adapter)
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    if chosen.compile:
        compile_networks(adapter)
    rate = matmul_rate(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows.say(f"\n{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}: {rate:.3f} TFLOP/s")
    for batch in chosen.batch:
        for form in chosen.form:
            about = f"{chosen.size}, crop {chosen.crop}, batch {batch}, group {chosen.group}"
            rows.say(f"\n### gdpo, {form}: {about}{', compiled' if chosen.compile else ''}")
            setup = set_up(adapter, method_of(adapter, chosen, form), chosen, batch)
            runs: dict[str, Any] = {"ours": Ours(setup)}
            counts = {"ours": gdpo_needs(units, form, batch, chosen.group)} if units else {}
            if second is not None:
                released = GDPOSR(adapter, second, judge(setup.method), chosen.group, setup.method.options.beta)
                runs["released"] = Theirs(setup, released, second)
                if units:
                    counts["released"] = gdpo_released(units, batch, chosen.group)
            report_steps(chosen, rows, runs, counts, rate)
            if not chosen.no_parts:
                report_parts(chosen, rows, setup, runs["ours"], counts.get("ours", {}), rate)


if __name__ == "__main__":
    main()
