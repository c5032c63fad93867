"""`rewardsr evaluate`: compare pipelines."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Device, Loras, Precision, Prompts, Run
from rewardsr.errors import UserError


def evaluate(
    data: Annotated[
        Path, typer.Argument(help="folder of lq/ and gt/, of HQ images or of lq/, or list of paths (.txt)")
    ],
    run: Run = None,
    adapter: AdapterName = "osediff",
    base: BaseOfRun = None,
    option: AdapterOption = None,
    lora: Loras = None,
    metrics: Annotated[str, typer.Option(help="rewards or pyiqa metrics, comma-separated")] = "psnr,ssim",
    draws: Annotated[int, typer.Option(min=1, help="noise draws that each score averages")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many images")] = None,
    side: Annotated[
        int | None, typer.Option(min=1, help="cut larger images to this many HQ pixels a side; by default as the run")
    ] = None,
    prompts: Prompts = None,
    cast: Annotated[
        bool, typer.Option("--cast", help="how much of a gain one constant offset of the latents gives")
    ] = False,
    cast_on: Annotated[
        str | None, typer.Option(help="--cast, with the offset measured on the images there (as DATA)")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the scores of every image, as JSON")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of degradation and noise; by default the run's, else 0")] = None,
    device: Device = "auto",
    precision: Precision = None,
    force_base: Annotated[bool, typer.Option("--force-base", help="load a LoRA of another base")] = False,
) -> None:
    """Compare base and tuned pipeline on the same images and noise, with 95 % intervals.

    With --run, images are degraded, prompted and seeded as in that run's own validation.

    --cast tells what one constant offset of the latents (a number a channel, the same for every image, no LoRA) gives
    of each gain, and what the LoRA gives without it; above a half it is mostly a global cast. The offset is the mean
    change of the latents on the images compared, where it looks as good as a constant can, or on others (--cast-on:
    those the run was trained on, say), within the same limit and side. It takes three times as long.
    """
    if run is None and not lora:
        raise UserError("evaluate compares base and tuned: give --run, or --lora")
    from rewardsr.evaluation import protocol
    from rewardsr.pipelines import open_run
    from rewardsr.storage import expand, write_text

    pipeline, recipe = open_run(
        run, adapter, base, option, lora, device=device, precision=precision, force_base=force_base
    )
    found = protocol.evaluate(
        pipeline,
        data,
        [name.strip() for name in metrics.split(",") if name.strip()],
        draws_per_image=draws,
        seed=seed if seed is not None else 0 if recipe is None else recipe.seed,
        limit=limit,
        side=side if side is not None or recipe is None else recipe.data.validation_side,
        protocol=None if recipe is None else recipe.data,
        prompts=prompts,
        cast=cast if cast_on is None else cast_on,
    )
    console.say(found)
    if output is not None:
        write_text(expand(output), found.to_json())
