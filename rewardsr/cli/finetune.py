"""`rewardsr finetune`: options over a recipe."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardsr.cli.options import Base

logger = logging.getLogger(__name__)


def finetune(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; options below override it")] = None,
    adapter: Annotated[str | None, typer.Option(help="registered adapter, or module:Name")] = None,
    base: Base = None,
    trainer: Annotated[str | None, typer.Option(help="registered trainer, or module:Name")] = None,
    data: Annotated[
        str | None, typer.Option(help="folder of HQ images, of lq/ and gt/ or of lq/, or list of paths (.txt)")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="the same for held-out images")] = None,
    rewards: Annotated[str | None, typer.Option(help="name=weight,... (psnr=0.5,musiq=0.5)")] = None,
    output: Annotated[str | None, typer.Option(help="folder of the run")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per process and pass")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    precision: Annotated[
        str | None, typer.Option(help="of the base: auto (bf16 where CUDA has it), fp32 or bf16")
    ] = None,
    reward_crop: Annotated[
        int | None, typer.Option(help="judge a random window of so many pixels a side (trainer rfsr): less memory")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="less memory, more time")
    ] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="any key of the recipe: a.b=c")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in the output folder, if there is one")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="measure two steps: time of the run, memory, what it saves")
    ] = False,
) -> None:
    """Train a LoRA for a pipeline: with rewards, or a one-step base towards HQ images (trainer naosd)."""
    from rewardsr.train.recipe import load_recipe, parse_rewards

    overrides: dict[str, Any] = {
        "adapter": adapter,
        "base": base,
        "trainer": trainer,
        "data.train": data,
        "data.validation": validation,
        "rewards": None if rewards is None else parse_rewards(rewards),
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "trainer_options.reward_crop": reward_crop,
    }
    resolved = load_recipe(None if recipe is None else str(recipe), overrides, assign or [])

    from rewardsr.train.finetune import finetune as run_recipe
    from rewardsr.train.loop import Result

    result = run_recipe(resolved, resume=resume, dry_run=dry_run)
    logger.info("%s", result)
    if isinstance(result, Result) and not result.finished:
        raise typer.Exit(130)
