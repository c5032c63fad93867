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
import statistics
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _count import (
    META,
    Counts,
    count_ours,
    count_released,
    gdpo_needs,
    gdpo_released,
    rfsr_needs,
    unit_flops,
)
from _memory import held, unless_out_of_memory, working
from _meter import Meter, matmul_rate, medians, timed, watched
from _rows import Rows
from _setup import (
    FORMS,
    Ours,
    Theirs,
    common_arguments,
    complete,
    make_adapter,
    method_of,
    precision,
    prepare_adapter,
    released_of,
    rfsr_step,
    seconds_of,
    set_up,
)
from _sizes import PARAMETERS, parameter_counts, vgg_file


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser)
    parser.add_argument("--form", choices=sum(FORMS.values(), ()), nargs="+", help="one or several, see _setup.py")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="one or several")
    parser.add_argument("--against", choices=["released"], help="measure the released step in turn with ours")
    parser.add_argument("--steps", type=int, default=5, help="measured, after two that warm up")
    parser.add_argument("--no-parts", action="store_true", help="whole steps only")
    parser.add_argument("--no-count", action="store_true", help="no operations: starts a few seconds earlier")
    parser.add_argument("--count-only", action="store_true", help="operations only, on the meta device")
    chosen = parser.parse_args()
    usual = complete(chosen)
    chosen.form = chosen.form or usual
    if chosen.adapter == "seesr" and chosen.trainer == "gdpo":
        parser.error("GDPO-SR is of one-step pipelines: leave --adapter out")
    fitting = FORMS["gdpo"] if chosen.trainer == "gdpo" else usual
    if not set(chosen.form) <= set(fitting):
        parser.error(f"--form of {chosen.trainer} on {chosen.adapter}: {', '.join(fitting)}")
    return chosen


def total(counts: Counts) -> float:
    """GFLOP of all parts."""
    return sum(counts.values()) / 1e9


def needs(chosen: argparse.Namespace, units: Counts, form: str, batch: int, method: Any) -> Counts:
    """What the maths of our step needs."""
    if chosen.trainer == "gdpo":
        return gdpo_needs(units, form, batch, chosen.group)
    passes = 1 if method.adapter.guidance == 1 else 2
    taken = 0 if chosen.rollout == "none" else rfsr_step(form, len(method.adapter.steps)) * passes
    return rfsr_needs(units, form, batch, taken)


def released_counts(chosen: argparse.Namespace, units: Counts, batch: int, released: Any) -> Counts:
    """What the released step does."""
    if chosen.trainer == "gdpo":  # equal to the count, and there at once
        return gdpo_released(units, batch, chosen.group)
    return count_released(released, chosen, batch)


def counted(chosen: argparse.Namespace, call_by_call: bool) -> dict[tuple[str, int], dict[str, Counts]]:
    """Operations by form and batch: of "ours" as needed and of "released"; "counted" of ours only where asked for."""
    adapter = make_adapter(chosen, META, torch.float32)
    if chosen.size == "sd21" and chosen.adapter == "osediff":
        assert parameter_counts(adapter) == PARAMETERS, "these are not Stable Diffusion 2.1's sizes"
    second = seconds_of(adapter, chosen, META, torch.float32)
    prepare_adapter(adapter, Namespace(**{**vars(chosen), "gradient_checkpointing": False, "compile": False}))
    units = unit_flops(adapter, chosen.crop, method_of(adapter, chosen, chosen.form[-1]))
    found: dict[tuple[str, int], dict[str, Counts]] = {}
    for form in chosen.form:
        method = method_of(adapter, chosen, form)
        for batch in chosen.batch:
            mine = {"ours": needs(chosen, units, form, batch, method)}
            theirs = released_of(method_of(adapter, chosen, form), chosen, second)
            mine["released"] = released_counts(chosen, units, batch, theirs)
            if call_by_call:
                mine["counted"] = count_ours(method, chosen, batch)
            found[form, batch] = mine
    return found


def report_counts(chosen: argparse.Namespace, rows: Rows) -> None:
    """What each real step does, counted call by call, what its maths needs, and what the released step does."""
    for (form, batch), counts in counted(chosen, True).items():
        rows.head(f"{chosen.trainer}, {form}, batch {batch}: GFLOP", *counts)
        for part in dict.fromkeys(part for parts in counts.values() for part in parts):
            rows.row(part, *(f"{parts.get(part, 0) / 1e9:,.2f}" for parts in counts.values()))
        rows.row("**step, rewards apart**", *(f"{total(parts):,.2f}" for parts in counts.values()))


def report_steps(
    chosen: argparse.Namespace, rows: Rows, runs: dict[str, Any], counts: dict[str, Counts], rate: float
) -> None:
    """Whole steps: those of all runs in turn, then a line for each, and what ours is of the other.

    A run that there is not enough memory for is taken out of `runs`.
    """
    device, taken = torch.device(chosen.device), dict[str, list[float]]()
    for turn in range(chosen.steps + 2):
        for name, run in list(runs.items()):
            seconds = unless_out_of_memory(partial(timed, run.step, device), device)
            if seconds is None:
                rows.say(f"{name}: out of memory")
                del runs[name]
                continue
            if turn > 1:
                taken.setdefault(name, []).append(seconds)
            rows.note(f"{'warm-up' if turn < 2 else 'step'} {turn}, {name}: {seconds:.4f} s")
    found: dict[str, tuple[float, ...]] = {}
    rows.head("step", "seconds", "fastest", "slowest", "working GiB", "in all GiB", "TFLOP", "of matmul")
    for name, run in runs.items():
        work = working(run.step, device) + run.recorded()
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
    for part in seconds:
        cells = ["", f"{seconds[part]:.4f}", "", ""]
        if part in counts:
            speed = counts[part] / seconds[part] / 1e12
            cells = [f"{counts[part] / 1e9:,.2f}", f"{seconds[part]:.4f}", f"{speed:.3f}", f"{speed / rate:.0%}"]
        rows.row(part, *cells, f"{meter.peak[part] / 2**30:.2f}" if part in meter.peak else "")


def main(folder: Path) -> None:
    """Count, or measure; the folder is for files of random weights."""
    chosen = arguments()
    chosen.vgg = vgg_file(folder, chosen.size) if chosen.trainer == "rfsr" else None
    rows = Rows(chosen.output)
    if chosen.count_only:
        report_counts(chosen, rows)
        return
    device, dtype = torch.device(chosen.device), precision(chosen)
    counts = {} if chosen.no_count else counted(chosen, False)
    adapter = make_adapter(chosen, device, dtype)
    second = seconds_of(adapter, chosen, device, dtype) if chosen.against else ()
    prepare_adapter(adapter, chosen)
    rate = matmul_rate(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows.say(f"\n{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}: {rate:.3f} TFLOP/s")
    for batch in chosen.batch:
        for form in chosen.form:
            about = f"{chosen.size}, crop {chosen.crop}, batch {batch}"
            about += f", group {chosen.group}" if chosen.trainer == "gdpo" else f", rollout {chosen.rollout}"
            about += ", compiled" * chosen.compile + ", recorded" * chosen.cuda_graphs
            rows.say(f"\n### {chosen.trainer} on {chosen.adapter}, {form}: {about}")
            if device.type == "cuda":
                torch.cuda.empty_cache()  # of other shapes
            setup = set_up(adapter, method_of(adapter, chosen, form), chosen, batch)
            runs: dict[str, Any] = {"ours": Ours(setup)}
            if second:
                runs["released"] = Theirs(setup, released_of(setup.method, chosen, second))
            mine = counts.get((form, batch), {})
            report_steps(chosen, rows, runs, mine, rate)
            if "ours" in runs and not chosen.no_parts:
                report_parts(chosen, rows, setup, runs["ours"], mine.get("ours", {}), rate)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
