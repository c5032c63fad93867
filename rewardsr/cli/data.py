"""`rewardsr data ...`: looking at images before a run."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.cli.panels import HELP, Command, Group
from rewardsr.errors import UserError

data = typer.Typer(
    help="Look at images before a run.", cls=Group, context_settings=HELP, no_args_is_help=True, rich_markup_mode=None
)


@data.command(cls=Command, context_settings=HELP)
def preview(
    folder: Annotated[Path, typer.Argument(help="folder of HQ images")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the picture, a PNG")],
    recipe: Annotated[
        Path | None, typer.Option(help="go by the degradation and scale of this recipe, or of the run in this folder")
    ] = None,
    degradation: Annotated[
        str | None, typer.Option(help="registered degradation, or module:Name; by default the recipe's, else light")
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="option of the degradation, key=value (noise=[0,8])")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(min=1, help="HQ is this many times LQ; by default the recipe's, else 4")
    ] = None,
    side: Annotated[int, typer.Option(min=1, help="images are cut to this many HQ pixels a side")] = 256,
    images: Annotated[int, typer.Option(min=1, help="the first so many")] = 4,
    draws: Annotated[int, typer.Option(min=1, help="LQ images of each")] = 4,
    seed: Annotated[int, typer.Option(help="of the first draw")] = 0,
) -> None:
    """Write a picture of HQ images, each beside several LQ images that the degradation makes of it."""
    from rewardsr.evaluation import preview as pictures

    protocol, own_scale = pictures.previewed(recipe, degradation, assign or [])
    path = pictures.preview(
        folder, output, protocol, scale=scale or own_scale, side=side, images=images, draws=draws, seed=seed
    )
    console.say(path)


@data.command(cls=Command, context_settings=HELP)
def check(
    place: Annotated[
        str, typer.Argument(metavar="DIR", help="folder of images, list of paths (.txt), or with --dataset its name")
    ],
    crop: Annotated[int, typer.Option(min=1, help="side of the training crops in HQ pixels")] = 512,
    scale: Annotated[int, typer.Option(min=1, help="HQ is this many times LQ")] = 4,
    layout: Annotated[
        str, typer.Option(help="hq, pairs (lq/ and gt/), lq (no HQ images), or auto: what the folders are called")
    ] = "auto",
    dataset: Annotated[
        bool, typer.Option("--dataset", help="it is a data set of the package datasets: id on the Hub, or folder")
    ] = False,
    prompts: Annotated[
        str | None, typer.Option(help="sidecar or metadata: a missing text counts as a fault; by default it does not")
    ] = None,
    caption_column: Annotated[str, typer.Option(help="of the texts in metadata.jsonl or in a data set")] = "text",
    max_unreadable: Annotated[float, typer.Option(min=0, max=1, help="as data.max_unreadable of a recipe")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="print everything, with all names, as JSON")] = False,
) -> None:
    """Count images, sizes, what is too small, unreadable, twice there or without partner or text.

    Exit code 2 where a run would refuse the images.
    """
    from rewardsr.data.survey import survey
    from rewardsr.options import parse
    from rewardsr.train.recipe import SourceRecipe

    source = parse(SourceRecipe, {"dataset" if dataset else "path": place, "layout": layout}, "data check")
    found = survey(source, scale, crop, prompts, max_unreadable, caption_column)
    console.say(found.to_json() if as_json else found)
    if found.problems:
        raise UserError(f"'{place}' cannot be used: {'; '.join(found.problems)}")
