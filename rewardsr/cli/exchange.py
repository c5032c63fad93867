"""`rewardsr import ...` and `rewardsr export`: what other programs made, and what they read."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Loras, Run
from rewardsr.cli.panels import HELP, Command, Group
from rewardsr.errors import UserError

imports = typer.Typer(
    help="Take over what other programs made.",
    cls=Group,
    context_settings=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@imports.command("lora", cls=Command, context_settings=HELP)
def import_lora(
    source: Annotated[Path, typer.Argument(help="kohya, diffusers or peft file or folder, or the family's checkpoint")],
    output: Annotated[Path, typer.Argument(help="new folder for the LoRA")],
    base: Annotated[str, typer.Option(help="the pipeline that it is for: diffusers folder, Hub id, or 'embedded'")],
    adapter: AdapterName = "osediff",
    option: AdapterOption = None,
) -> None:
    """Turn a LoRA of another program into one that every command here loads; pickles never run code."""
    from rewardsr.lora import exchange
    from rewardsr.lora.file import file_name, write
    from rewardsr.pipelines import open_outline

    folder = exchange.check_output(output)
    pipeline, _ = open_outline(None, adapter, base, option)
    given = exchange.read_foreign(pipeline, source)
    path = write(pipeline, given, folder / file_name())
    console.say(f"rank {given.rank}, alpha {given.alpha:g}: {path}")


@imports.command("stablesr", cls=Command, context_settings=HELP)
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
    from rewardsr.outline import outlined
    from rewardsr.pipelines import open_outline, open_run

    folder = exchange.check_output(output, form)
    if form == "merged":
        with outlined({"text_encoder"}):
            pipeline, _ = open_run(
                run, adapter, base, option, lora, strength=strength, device=None, force_base=force_base
            )
        exchange.export(pipeline, folder, form)
    else:
        pipeline, given = open_outline(run, adapter, base, option, lora, strength=strength, force_base=force_base)
        if given is None:
            raise UserError("say which LoRA: --run FOLDER of a run, or --lora")
        exchange.write_as(pipeline, given, folder, form)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            console.say(path)
