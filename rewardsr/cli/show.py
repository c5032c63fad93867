"""What there is and what it is like: `rewardsr adapters`, `rewards`, `doctor` and `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console


def adapters(
    name: Annotated[str | None, typer.Argument(help="registered adapter, or module:Name: lists its options")] = None,
) -> None:
    """List the pipelines that can be fine-tuned, or the options of one."""
    from rewardsr.options import describe
    from rewardsr.pipelines import adapter_class, describe_adapters

    if name is not None:
        for option in describe(adapter_class(name).Options):
            console.say(f"{option.name} ({option.type}, default {option.default}): {option.description}")
        return
    for registered, text in describe_adapters():
        console.say(f"{registered:<16} {text}")


def rewards() -> None:
    """List the built-in rewards."""
    from rewardsr.rewards import known

    for name, kind, needs_hq, differentiable, licence in known():
        needs = "needs HQ" if needs_hq else "no HQ"
        console.say(f"{name:<18} {kind:<9} {needs:<9} {'differentiable' if differentiable else '':<15} {licence}")
    console.say("any pyiqa metric id works too (musiq, maniqa, clipiqa, ...); so does module:Name")


def doctor() -> None:
    """Show versions and devices, and what is missing."""
    from rewardsr.doctor import examine

    for line in examine():
        console.say(line)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for everything that the demo makes")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
) -> None:
    """Fine-tune the embedded pipeline with GDPO on photographs, and look at what that did (CPU, minutes)."""
    from rewardsr.demo.run import run_demo

    run_demo(output, steps)
