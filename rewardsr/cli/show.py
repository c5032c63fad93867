"""What there is and what it is like: lists of plug-ins and their options, `recipe`, `doctor` and `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.errors import UserError

Name = Annotated[str | None, typer.Argument(help="a registered one, or module:Name: lists its options")]


def adapters(name: Name = None) -> None:
    """List the pipelines that can be fine-tuned, or the options of one (recipe: adapter_options)."""
    _show("adapters", name)


def trainers(name: Name = None) -> None:
    """List the ways of training, or the options of one (recipe: trainer_options)."""
    _show("trainers", name)


def degradations(name: Name = None) -> None:
    """List what makes HQ images LQ, or the options of one (recipe: data.degradation, beside its name)."""
    _show("degradations", name)


def captioners(name: Name = None) -> None:
    """List what captions images, or the options of one (recipe: data.captioner_options)."""
    _show("captioners", name)


def rewards(
    name: Annotated[
        str | None, typer.Argument(help="a registered one, a pyiqa id, or module:Name: lists its options")
    ] = None,
) -> None:
    """List the built-in rewards, or the options of one (recipe: rewards, beside name and weight)."""
    if name is not None:
        _show("rewards", name)
        return
    from rewardsr.rewards import known

    for registered, kind, needs_hq, differentiable, licence in known():
        needs = "needs HQ" if needs_hq else "no HQ"
        console.say(f"{registered:<18} {kind:<9} {needs:<9} {'differentiable' if differentiable else '':<15} {licence}")
    console.say("any pyiqa metric id works too (musiq, maniqa, clipiqa, ...); so does module:Name")


def _show(kind: str, name: str | None) -> None:
    from rewardsr import catalogue

    if name is None:
        for entry in catalogue.entries(kind):
            console.say(f"{entry.name:<16} {entry.about}")
        return
    for line in catalogue.listed(catalogue.options_of(kind, name)) or [f"{kind.removesuffix('s')} '{name}' has none"]:
        console.say(line)


def recipe(
    adapter: Annotated[str, typer.Option(help="registered adapter, or module:Name")] = "osediff",
    trainer: Annotated[str, typer.Option(help="registered trainer, or module:Name")] = "gdpo",
    preset: Annotated[str | None, typer.Option(help="what fits: 12gb, 16gb, 24gb, 80gb (one CUDA card) or cpu")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="new file; else it is printed")] = None,
) -> None:
    """Print a recipe for finetune with every key there is, what it means and what it may be."""
    from rewardsr.storage import expand, write_text
    from rewardsr.train.template import template

    target = None if output is None else expand(output)
    if target is not None and target.exists():
        raise UserError(f"'{target}' exists already: choose a new file")
    text = template(adapter, trainer, preset)
    if target is None:
        console.say(text.rstrip("\n"))
    else:
        write_text(target, text)


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
