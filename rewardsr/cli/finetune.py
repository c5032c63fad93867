"""`rewardsr finetune`: options over a recipe."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardsr.cli.options import COMPUTE, PIPELINE, AdapterOption, Base

IMAGES, TRAINING = "Images and rewards", "Training"

logger = logging.getLogger(__name__)

Data = Annotated[
    str | None,
    typer.Option(help="folder of HQ images, of lq/ and gt/ or of lq/, or list of paths (.txt)", rich_help_panel=IMAGES),
]
Validation = Annotated[str | None, typer.Option(help="the same for held-out images", rich_help_panel=IMAGES)]
Rewards = Annotated[str | None, typer.Option(help="name=weight,... (psnr=0.5,musiq=0.5)", rich_help_panel=IMAGES)]
Crop = Annotated[int | None, typer.Option(help="side of the HQ crops in pixels (data.crop)", rich_help_panel=IMAGES)]
Lr = Annotated[
    float | None, typer.Option("--lr", help="learning rate (optimiser.learning_rate)", rich_help_panel=TRAINING)
]
Rank = Annotated[
    int | None,
    typer.Option(help="of the LoRA (lora.rank); its alpha stays as the recipe has it", rich_help_panel=TRAINING),
]
Precision = Annotated[
    str | None,
    typer.Option(help="of the base: auto (bf16 where CUDA has it), fp32 or bf16", rich_help_panel=COMPUTE),
]
RewardCrop = Annotated[
    int | None,
    typer.Option(
        help="judge a random window of so many pixels a side (trainer rfsr): less memory", rich_help_panel=COMPUTE
    ),
]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="less memory, more time",
        rich_help_panel=COMPUTE,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="go on with the run in the output folder, if there is one", rich_help_panel=TRAINING),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="measure two steps: time of the run, memory, what it saves", rich_help_panel=TRAINING
    ),
]


def finetune(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; options below override it")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="registered adapter, or module:Name", rich_help_panel=PIPELINE)
    ] = None,
    base: Base = None,
    option: AdapterOption = None,
    trainer: Annotated[
        str | None, typer.Option(help="registered trainer, or module:Name", rich_help_panel=TRAINING)
    ] = None,
    data: Data = None,
    validation: Validation = None,
    rewards: Rewards = None,
    crop: Crop = None,
    output: Annotated[str | None, typer.Option(help="folder of the run", rich_help_panel=TRAINING)] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="images per process and pass", rich_help_panel=TRAINING)
    ] = None,
    lr: Lr = None,
    rank: Rank = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn", rich_help_panel=TRAINING)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps", rich_help_panel=COMPUTE)] = None,
    precision: Precision = None,
    reward_crop: RewardCrop = None,
    gradient_checkpointing: GradientCheckpointing = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="any key of the recipe: a.b=c")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Train a LoRA for a pipeline: with rewards, or a one-step base towards HQ images (trainer naosd)."""
    from rewardsr.train.recipe import assignments_of, load_recipe, parse_rewards

    overrides: dict[str, Any] = {
        "adapter": adapter,
        "base": base,
        "trainer": trainer,
        "data.train": data,
        "data.validation": validation,
        "rewards": None if rewards is None else parse_rewards(rewards),
        "data.crop": crop,
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "optimiser.learning_rate": lr,
        "lora.rank": rank,
        "seed": seed,
        "device": device,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "trainer_options.reward_crop": reward_crop,
    }
    overrides |= {f"adapter_options.{key}": value for key, value in assignments_of(option or [], "--option").items()}
    resolved = load_recipe(None if recipe is None else str(recipe), overrides, assign or [])

    from rewardsr.train.finetune import finetune as run_recipe
    from rewardsr.train.loop import Result

    result = run_recipe(resolved, resume=resume, dry_run=dry_run)
    logger.info("%s", result)
    if isinstance(result, Result) and not result.finished:
        raise typer.Exit(130)
