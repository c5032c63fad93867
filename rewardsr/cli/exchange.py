"""`rewardsr import ...` and `rewardsr export`: what other programs made, and what they read."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Loras, Run

imports = typer.Typer(help="Take over what other programs made.", no_args_is_help=True, rich_markup_mode=None)


@imports.command("lora")
def import_lora(
    source: Annotated[Path, typer.Argument(help="kohya, diffusers or peft file or folder, or the family's checkpoint")],
    output: Annotated[Path, typer.Argument(help="new folder for the LoRA")],
    base: Annotated[str, typer.Option(help="the pipeline that it is for: diffusers folder, Hub id, or 'embedded'")],
    adapter: AdapterName = "osediff",
    option: AdapterOption = None,
) -> None:
    """Turn a LoRA of another program into one that every command here loads; pickles never run code."""
    from rewardsr import lora
    from rewardsr.lora import exchange
    from rewardsr.pipelines import open_run

    exchange.check_output(output)
    pipeline, _ = open_run(None, adapter, base, option, device="cpu", precision="fp32")
    path = exchange.import_lora(pipeline, source, output)
    rank, alpha = lora.rank_and_alpha(pipeline)
    console.say(f"rank {rank}, alpha {alpha:g}: {path}")


@imports.command("stablesr")
def import_stablesr(
    source: Annotated[Path, typer.Argument(metavar="CKPT", help="released checkpoint, .ckpt or .safetensors")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="new folder, with unet/ and struct_encoder/")],
    prediction: Annotated[
        str, typer.Option(help="epsilon or v_prediction; auto: tries out which of them the network predicts")
    ] = "auto",
    check: Annotated[bool, typer.Option("--check/--no-check", help="whether the network is tried out at all")] = True,
) -> None:
    """Turn a StableSR checkpoint into a folder of safetensors, for the adapter's option `weights`."""
    from rewardsr.adapters.stablesr import import_checkpoint

    found = import_checkpoint(source, output, prediction, check)
    console.say(f"{output}: predicts {found}; use it with --adapter stablesr --base SD-2.1 --option weights={output}")


def export(
    output: Annotated[Path, typer.Argument(help="new folder")],
    form: Annotated[str, typer.Option("--format", help="diffusers, peft, kohya (ComfyUI), osediff or merged")],
    run: Run = None,
    adapter: AdapterName = "osediff",
    base: BaseOfRun = None,
    option: AdapterOption = None,
    lora: Loras = None,
    strength: Annotated[float, typer.Option(help="of the LoRA, taken into the files")] = 1.0,
    force_base: Annotated[bool, typer.Option("--force-base", help="load a LoRA of another base")] = False,
) -> None:
    """Write a LoRA in the form of another program; merged networks serve as an adapter's `weights`."""
    from rewardsr.lora import exchange
    from rewardsr.pipelines import open_run

    exchange.check_output(output, form)
    pipeline, _ = open_run(
        run, adapter, base, option, lora, strength=strength, device="cpu", precision="fp32", force_base=force_base
    )
    for path in sorted(exchange.export(pipeline, output, form).rglob("*")):
        if path.is_file():
            console.say(path)
