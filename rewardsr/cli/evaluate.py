"""`rewardsr evaluate` and `rewardsr sweep`: compare pipelines."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rewardsr import console
from rewardsr.cli.options import AdapterName, AdapterOption, BaseOfRun, Device, Precision, Prompts, Run
from rewardsr.errors import UserError

Images = Annotated[Path, typer.Argument(help="folder of lq/ and gt/, of HQ images or of lq/, or list of paths (.txt)")]
Protocol = Annotated[str, typer.Option(help="how outputs are finished and scored: plain, osediff, seesr or gdpo-sr")]
Metrics = Annotated[
    str | None, typer.Option(help="rewards or pyiqa metrics, comma-separated; by default the protocol's (psnr,ssim)")
]
MetricOption = Annotated[
    list[str] | None, typer.Option(help="option of a metric, NAME.KEY=VALUE (musiq.weights=musiq.safetensors)")
]
ColorFix = Annotated[str | None, typer.Option(help="none, adain or wavelet; by default the protocol's")]
Draws = Annotated[int, typer.Option(min=1, help="noise draws that each score averages")]
Limit = Annotated[int | None, typer.Option(min=1, help="the first so many images")]
Side = Annotated[
    int | None, typer.Option(min=1, help="cut larger images to this many HQ pixels a side; by default as the run")
]
SeedOfRun = Annotated[int | None, typer.Option(help="of degradation and noise; by default the run's, else 0")]
ForceBase = Annotated[bool, typer.Option("--force-base", help="load a LoRA of another base")]


def evaluate(
    data: Images,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="folder of a run, or user/name; several; PLACE:0.5 for its strength, NAME=PLACE for its name"
        ),
    ] = None,
    adapter: AdapterName = "osediff",
    base: BaseOfRun = None,
    option: AdapterOption = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="a LoRA on the pipeline of --base or the first --run; as --run; a:0.7+b:0.3 sums"),
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="folder of images of any program, FOLDER or NAME=FOLDER")
    ] = None,
    bicubic: Annotated[bool, typer.Option("--bicubic", help="also LQ enlarged")] = False,
    no_base: Annotated[bool, typer.Option("--no-base", help="leave out the base; the first system takes its place")] = (
        False
    ),
    protocol: Protocol = "plain",
    metrics: Metrics = None,
    metric_option: MetricOption = None,
    color_fix: ColorFix = None,
    draws: Draws = 1,
    limit: Limit = None,
    side: Side = None,
    scale: Annotated[int, typer.Option(min=1, help="HQ is this many times LQ, where no pipeline says so")] = 4,
    prompts: Prompts = None,
    cast: Annotated[
        bool, typer.Option("--cast", help="how much of a gain one constant offset of the latents gives")
    ] = False,
    cast_on: Annotated[
        str | None, typer.Option(help="--cast, with the offset measured on the images there (as DATA)")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder for tables (JSON, CSV, Markdown, LaTeX) and pictures")
    ] = None,
    seed: SeedOfRun = None,
    device: Device = "auto",
    precision: Precision = None,
    force_base: ForceBase = False,
) -> None:
    """Compare systems on the same images and noise, with 95 % intervals.

    Systems are runs, LoRAs, the base that they sit on, bicubic, and folders of images; all are compared with the base,
    or else with the first one. Images are degraded and seeded as in the first run's own validation; each run is
    prompted as it was.

    --cast tells what one constant offset of the latents (a number a channel, the same for every image, no LoRA) gives
    of each gain, and what the LoRA gives without it; above a half it is mostly a global cast. The offset is the mean
    change of the latents on the images compared, where it looks as good as a constant can, or on others (--cast-on:
    those the run was trained on, say), within the same limit and side. It takes three times as long.
    """
    from rewardsr.evaluation import evaluate as evaluation
    from rewardsr.evaluation.asked import Pipelines, asked_for
    from rewardsr.evaluation.exports import worst_in_words
    from rewardsr.pipelines import choose_device

    pipelines = Pipelines(adapter, base, option or (), device, precision, force_base)
    asked = asked_for(pipelines, run or (), lora or (), images or (), bicubic=bicubic, with_base=not no_base)
    found = evaluation.evaluate(
        asked.systems,
        data,
        output=output,
        scale=scale,
        device=choose_device(device, precision or "auto")[0],
        cast=cast if cast_on is None else cast_on,
        **_shared(asked, protocol, metrics, metric_option, color_fix, draws, limit, side, prompts, seed),
    )
    console.say(found)
    for line in worst_in_words(found):
        console.say(line)
    if output is not None:
        console.say(f"tables and pictures: {output}")


def sweep(
    data: Images,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for curve.svg, grid.png, tables and pictures")],
    over: Annotated[
        str, typer.Option(help="setting and values: strength of the LoRA, or an adapter option (noise_t=100,250)")
    ] = "strength=0,0.25,0.5,0.75,1",
    run: Run = None,
    adapter: AdapterName = "osediff",
    base: BaseOfRun = None,
    option: AdapterOption = None,
    lora: Annotated[str | None, typer.Option("--lora", help="a LoRA instead of the run's; a:0.7+b:0.3 sums")] = None,
    protocol: Protocol = "plain",
    metrics: Metrics = None,
    metric_option: MetricOption = None,
    color_fix: ColorFix = None,
    draws: Draws = 1,
    limit: Limit = None,
    side: Side = None,
    prompts: Prompts = None,
    seed: SeedOfRun = None,
    device: Device = "auto",
    precision: Precision = None,
    force_base: ForceBase = False,
) -> None:
    """Score one setting of a pipeline at several values: a table, a curve and pictures, to choose from."""
    key, mark, values = over.partition("=")
    if not mark or not key:
        raise UserError(f"--over {over}: expected SETTING=VALUE,VALUE,..., as strength=0,0.5,1 or noise_t=100,250")
    from rewardsr.evaluation.asked import Pipelines, variants
    from rewardsr.evaluation.sweep import CURVE, GRID
    from rewardsr.evaluation.sweep import sweep as run_sweep

    pipelines = Pipelines(adapter, base, option or (), device, precision, force_base)
    asked = variants(pipelines, run, lora, key.strip(), _split(values))
    shared = _shared(asked, protocol, metrics, metric_option, color_fix, draws, limit, side, prompts, seed)
    console.say(run_sweep(asked.systems, data, output, **shared))
    console.say(f"look at {output / CURVE} and {output / GRID}")


def _shared(
    asked: Any,
    protocol: str,
    metrics: str | None,
    metric_option: list[str] | None,
    color_fix: str | None,
    draws: int,
    limit: int | None,
    side: int | None,
    prompts: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """What both commands hand on; what is not given is the first run's."""
    recipe = asked.recipe
    options: dict[str, dict[str, Any]] = {}
    for text in metric_option or ():
        place, mark, value = text.partition("=")
        name, dot, key = place.rpartition(".")
        if not (mark and dot and name and key):
            raise UserError(f"--metric-option {text}: expected NAME.KEY=VALUE, as musiq.weights=musiq.safetensors")
        options.setdefault(name, {})[key] = value
    return {
        "metrics": None if metrics is None else _split(metrics),
        "convention": protocol,
        "color_fix": color_fix,
        "metric_options": options,
        "draws_per_image": draws,
        "seed": seed if seed is not None else 0 if recipe is None else recipe.seed,
        "limit": limit,
        "side": side if side is not None or recipe is None else recipe.data.validation_side,
        "protocol": None if recipe is None else recipe.data,
        "prompts": prompts,
        "trained_on": asked.trained_on,
        "margins": asked.margins,
    }


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
