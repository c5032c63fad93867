"""`rewardsr import ...`: what other programs made."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console

imports = typer.Typer(help="Take over what other programs made.", no_args_is_help=True, rich_markup_mode=None)

AdapterName = Annotated[str, typer.Option(help="registered adapter, or module:Name")]
AdapterOption = Annotated[list[str] | None, typer.Option("--option", help="adapter option, key=value (noise_t=250)")]


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
