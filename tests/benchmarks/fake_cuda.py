"""What a step does on CUDA, counted without a card: memory, kernels, copies and waits, for every adapter and trainer.

    python tests/benchmarks/fake_cuda.py --size sd21 --adapter osediff --trainer gdpo --parts --sites
    python tests/benchmarks/fake_cuda.py --size sd21 --all

Memory, kernels, operations, traffic and copies are counted (`tests/fake_cuda`). The time is an estimate for an H100:
over all kernels the sum of max(operations / 600 T/s in bf16 or 45 T/s in float32, 300 with TF32; bytes / 2.7 TB/s;
2 us). Add to the memory what the allocator, cuDNN and CUDA's context take: 1.5 to 2.5 GB.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fake_cuda"))

from _records import Cost
from _steps import ADAPTERS, Case, Measured, measure

SIDES = {"sd21": 512, "tiny": 64}
TRAINERS = ("gdpo", "rfsr", "naosd", "upscale")
ROW = ("peak GB", "kernels", "TFLOP", "traffic GB", "copies", "waits", "estimate ms")


def cases(adapter: str, trainer: str) -> Iterator[Case]:
    """The rows of a trainer on an adapter, tiny."""
    case = Case(adapter, trainer, "")
    if trainer == "upscale":
        yield replace(case, label="plain")
        yield replace(case, label="tiled", options={"tile": 32, "tile_overlap": 8}, side=2 * case.side)
        return
    if trainer == "rfsr":
        last = 0 if adapter == "osediff" else case.sampler - 1  # all terms act on every step
        case = replace(case, options={"structure_window": (0, last), "reward_window": (0, last)})
        crop = {**case.options, "reward_crop": case.side // 2}
        yield replace(case, label="whole")
        yield replace(case, label="crop", options=crop)
        yield replace(case, label="checkpointing", checkpointing=True)
        yield replace(case, label="both", options=crop, checkpointing=True)
        return
    if trainer == "naosd":
        if adapter == "osediff":  # it trains one-step pipelines
            yield replace(case, label="as published")
            yield replace(case, label="checkpointing", checkpointing=True)
            yield replace(case, label="checkpointing, b=4", checkpointing=True, batch=4)
            yield replace(case, label="checkpointing, no distillation", checkpointing=True, options={"vsd_weight": 0})
            yield replace(case, label="checkpointing, all weights", checkpointing=True, options={"full": "all"})
        return
    yield replace(case, label="paper")
    if adapter == "osediff":
        yield replace(case, label="paper, one prompt", fixed_prompt=True)
        yield replace(case, label="micro 2", options={"micro_batch": 2})
    yield replace(case, label="checkpointing", checkpointing=True)
    yield replace(case, label="checkpointing, micro 2", checkpointing=True, options={"micro_batch": 2})
    if adapter == "osediff":
        shared = {"preference": "conditional", "shared_noise": True}
        yield replace(case, label="conditional, shared noise", options=shared)
        yield replace(case, label="paper, b=4", batch=4)
        yield replace(case, label="paper, b=4, one prompt", batch=4, fixed_prompt=True)


def sized(case: Case, size: str) -> Case:
    """The case at another size than the tiny one."""
    times = SIDES[size] // case.side if case.trainer != "upscale" else SIDES[size] // 64
    options = dict(case.options)
    for name in ("reward_crop", "tile", "tile_overlap"):
        if name in options:
            options[name] *= times if name == "reward_crop" else 2 if size == "sd21" else 1
    return replace(case, size=size, side=case.side * times, options=options)


def row(found: Measured) -> list[str]:
    """The figures of a case."""
    return [*figures(found.total), str(found.copies), str(found.waits), f"{found.total.seconds * 1e3:,.0f}"]


def figures(cost: Cost) -> list[str]:
    """Memory, kernels, operations and traffic."""
    return [
        f"{cost.peak / 1e9:.2f}",
        f"{cost.kernels:,}",
        f"{cost.flops / 1e12:,.2f}",
        f"{cost.bytes / 1e9:,.1f}",
    ]


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows as Markdown."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def parts(found: Measured) -> None:
    """Print what each part takes."""
    rows = [[name, *figures(cost), f"{cost.seconds * 1e3:,.1f}"] for name, cost in found.parts.items()]
    table(["part", *ROW[:4], "estimate ms"], rows)


def sites(found: Measured) -> None:
    """Print who asked for copies and waits, most of them first."""
    groups = Counter(
        (event.site, event.kind, event.operation, event.part, event.pinned, event.waits) for event in found.events
    )
    sizes: Counter[tuple[object, ...]] = Counter()
    for event in found.events:
        sizes[event.site, event.kind, event.operation, event.part, event.pinned, event.waits] += event.bytes
    rows = []
    for key, count in groups.most_common():
        site, kind, operation, part, pinned, waits = key
        how = ", ".join(("pinned" if pinned else "pageable", "waits" if waits else "does not wait"))
        rows.append([site, part, f"{kind} ({operation})", how, str(count), f"{sizes[key]:,}"])
    table(["line", "part", "what", "how", "times", "bytes"], rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIDES), default="tiny")
    parser.add_argument("--adapter", choices=ADAPTERS, action="append", help="all that are named; default osediff")
    parser.add_argument("--trainer", choices=TRAINERS, action="append", help="all that are named; default gdpo")
    parser.add_argument("--label", action="append", help="only the rows of these names, say paper")
    parser.add_argument("--all", action="store_true", help="every adapter and trainer")
    parser.add_argument("--parts", action="store_true", help="the first row of each table by part")
    parser.add_argument("--sites", action="store_true", help="its copies and waits by line")
    return parser.parse_args()


def main() -> None:
    """Count and print."""
    chosen = arguments()
    adapters = ADAPTERS if chosen.all else chosen.adapter or ["osediff"]
    trainers = TRAINERS if chosen.all else chosen.trainer or ["gdpo"]
    for trainer, adapter in product(trainers, adapters):
        chosen_cases = [case for case in cases(adapter, trainer) if not chosen.label or case.label in chosen.label]
        found = {case.label: measure(sized(case, chosen.size)) for case in chosen_cases}
        table(
            ["trainer", "adapter", "case", *ROW], [[trainer, adapter, label, *row(of)] for label, of in found.items()]
        )
        for label, of in list(found.items())[:1]:
            if chosen.parts or chosen.sites:
                print(f"{trainer}, {adapter}, {label}:\n")
            if chosen.parts:
                parts(of)
            if chosen.sites:
                sites(of)


if __name__ == "__main__":
    main()
