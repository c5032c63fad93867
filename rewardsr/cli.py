"""The command line. It turns options into calls and results into text; everything else lives elsewhere.

Heavy imports happen inside the commands, so that `--help` is quick.
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardsr import __version__, console
from rewardsr.cli_data import data as data_commands
from rewardsr.cli_import import AdapterName, AdapterOption
from rewardsr.cli_import import imports as import_commands
from rewardsr.errors import UserError, printable

app = typer.Typer(
    name="rewardsr",
    help="Fine-tune diffusion-based image super-resolution pipelines with image-quality rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

logger = logging.getLogger("rewardsr")

app.add_typer(import_commands, name="import")
app.add_typer(data_commands, name="data")

Base = Annotated[str | None, typer.Option(help="diffusers folder, Hub id, or 'embedded'")]
BaseOfRun = Annotated[
    str | None, typer.Option("--base", help="diffusers folder, Hub id, or 'embedded'; with --run: where its base lies")
]
Run = Annotated[str | None, typer.Option(help="folder of a run, or user/name: its adapter, base and LoRA are used")]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="file, folder or user/name[@revision]; several with weights, a:0.7")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Precision = Annotated[
    str | None,
    typer.Option(help="of the base: auto (bf16 where CUDA has it), fp32 or bf16; by default the run's, else auto"),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="adapter, sidecar (.txt beside each image), metadata (metadata.jsonl), captioner (the run's), or one text "
        "for all; by default the run's, else adapter"
    ),
]
Seed = Annotated[int, typer.Option(help="of the noise")]


def main() -> None:
    """Entry point: runs a command; the user's mistakes become one line and exit code 2."""
    console.run(app)


def _version(wanted: bool) -> None:
    if wanted:
        console.say(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    console.listen(logger)


@app.command()
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
        bool, typer.Option("--dry-run", help="one step: time, peak memory, what would be saved")
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; created if need be")],
    private: Annotated[bool, typer.Option("--private", help="a new repository becomes private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to; main by default")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and stop")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, for the card of a local one")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a dataset that was trained on")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="of the base, where its card is not here")] = None,
    keep_paths: Annotated[
        bool, typer.Option("--keep-paths", help="publish paths of this machine whole, not their last part alone")
    ] = False,
) -> None:
    """Publish a run on the Hugging Face Hub: LoRA, recipe, metrics, pictures and card, in one commit."""
    from rewardsr.hub.publish import push as publish

    pushed = publish(
        run,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        base_model=base_model,
        datasets=dataset or [],
        licence=licence,
        keep_paths=keep_paths,
    )
    console.say("nothing was sent" if pushed.url is None else pushed.url)


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(help="user/name or user/name@revision")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="new folder; else the Hub's cache")] = None,
) -> None:
    """Fetch an adapter from the Hub; --run and --lora take the same reference."""
    from rewardsr.hub.fetch import pull as fetch

    console.say(fetch(reference, output))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="words in the name")] = "",
    base: Annotated[str | None, typer.Option(help="only adapters for this base model")] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
) -> None:
    """List adapters on the Hub."""
    from rewardsr.hub.search import search as find

    for found in find(query, base, limit):
        line = f"{found.id:<48} {found.downloads:>8} downloads {found.likes:>5} likes  {found.base or ''}"
        console.say(printable(line))


@app.command()
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


@app.command()
def rewards() -> None:
    """List the built-in rewards."""
    from rewardsr.rewards import known

    for name, kind, needs_hq, differentiable, licence in known():
        needs = "needs HQ" if needs_hq else "no HQ"
        console.say(f"{name:<18} {kind:<9} {needs:<9} {'differentiable' if differentiable else '':<15} {licence}")
    console.say("any pyiqa metric id works too (musiq, maniqa, clipiqa, ...); so does module:Name")


@app.command()
def doctor() -> None:
    """Show versions and devices, and what is missing."""
    from rewardsr.doctor import examine

    for line in examine():
        console.say(line)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for everything that the demo makes")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
) -> None:
    """Fine-tune the embedded pipeline with GDPO on photographs, and look at what that did (CPU, minutes)."""
    from rewardsr.demo.run import run_demo

    run_demo(output, steps)
