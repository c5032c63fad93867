"""`rewardsr upscale`: use a pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Device, Loras, Precision, Prompts, Run, Seed
from rewardsr.interrupts import keeping


@keeping("finished images are kept; the same command goes on with the others")
def upscale(
    inputs: Annotated[list[Path], typer.Argument(help="images, or folders of images")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="folder for the results; or of one image a file, .png to .tif"),
    ],
    run: Run = None,
    adapter: AdapterName = "osediff",
    base: BaseOfRun = None,
    option: AdapterOption = None,
    lora: Loras = None,
    strength: Annotated[float, typer.Option(help="of the LoRA; 0 is the base")] = 1.0,
    color_fix: Annotated[str, typer.Option(help="none, adain or wavelet")] = "none",
    prompts: Prompts = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="png, jpeg, webp or tiff; by default by the output's name, else png"),
    ] = None,
    quality: Annotated[int, typer.Option(help="of JPEG and WebP, 1 to 100; WebP of 100 is lossless")] = 95,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="keep any files that are there, whatever made them")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace earlier results")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="load a LoRA of another base")] = False,
) -> None:
    """Super-resolve images, with a LoRA or without.

    The same call goes on where it was interrupted; several at a time share the images.
    """
    from rewardsr.evaluation.upscale import find_files
    from rewardsr.evaluation.upscale import upscale as run_upscale
    from rewardsr.pipelines import open_run

    files = find_files(inputs, output, color_fix, format, quality)
    pipeline, recipe = open_run(
        run, adapter, base, option, lora, strength=strength, device=device, precision=precision, force_base=force_base
    )
    run_upscale(
        pipeline,
        files,
        output,
        color_fix=color_fix,
        seed=seed,
        protocol=None if recipe is None else recipe.data,
        prompts=prompts,
        overwrite=overwrite,
        skip_existing=skip_existing,
        format=format,
        quality=quality,
    )
