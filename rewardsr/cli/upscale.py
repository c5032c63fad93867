"""`rewardsr upscale`: use a pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Device, Loras, Precision, Prompts, Run, Seed
from rewardsr.interrupts import keeping


@keeping("finished images are kept; the same command goes on with the others")
def upscale(
    inputs: Annotated[list[Path], typer.Argument(help="images, or folders of images")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the results")],
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace earlier results")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="load a LoRA of another base")] = False,
) -> None:
    """Super-resolve images, with a LoRA or without."""
    from rewardsr.evaluation.upscale import find_files
    from rewardsr.evaluation.upscale import upscale as run_upscale
    from rewardsr.pipelines import open_run

    files = find_files(inputs, output, color_fix)
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
    )
