"""HQ images beside what a degradation makes of them, to look at before a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from rewardsr.data.images import png_path
from rewardsr.data.protocol import open_images
from rewardsr.errors import UserError, shown
from rewardsr.evaluation.pictures import Cell, write_grid
from rewardsr.options import parse
from rewardsr.run_folder import RECIPE
from rewardsr.storage import expand
from rewardsr.train.recipe import DegradationRecipe, ProtocolRecipe, assignments_of, load_recipe
from rewardsr.train.recipe_text import assign

SCALE = 4  # where no recipe says another


def previewed(
    recipe: Path | str | None, degradation: str | None, assignments: Sequence[str]
) -> tuple[ProtocolRecipe, int]:
    """Protocol and scale to preview.

    Args:
        recipe: a YAML recipe, or the folder of a run; None: the defaults.
        degradation: instead of the recipe's, with its own defaults.
        assignments: `key=value` strings, options of the degradation.

    Raises:
        UserError: no such recipe, or something in it or in the assignments is wrong.
    """
    section: dict[str, Any] = {}
    scale: Any = SCALE
    if recipe is not None:
        path = expand(recipe)
        found = load_recipe(str(path / RECIPE if path.is_dir() else path), {}, [])
        section, scale = found.data.degradation.model_dump(), found.adapter_options.get("scale", SCALE)
        if not isinstance(scale, int):
            raise UserError(f"'{recipe}': adapter_options.scale is {shown(scale)}, expected a whole number")
    if degradation is not None and degradation != section.get("name"):
        section = {"name": degradation}
    for key, value in assignments_of(list(assignments), "--set").items():
        assign(section, key, value)
    return ProtocolRecipe(degradation=parse(DegradationRecipe, section, "--set")), scale


def preview(
    folder: Path | str,
    output: Path | str,
    protocol: ProtocolRecipe,
    *,
    scale: int = 4,
    side: int = 256,
    images: int = 4,
    draws: int = 4,
    seed: int = 0,
) -> Path:
    """Write a picture with a row for each image: HQ, and several LQ images of it, each drawn anew.

    LQ images are enlarged to the size of HQ without smoothing, so that noise and JPEG blocks show as they are.

    Args:
        folder: of HQ images.
        output: the picture, a PNG.
        protocol: whose degradation is shown: `recipe.data` of a run, or one of its own.
        scale: HQ is this many times LQ.
        side: images are cut at the centre to this many HQ pixels a side.
        images: the first so many are shown.
        draws: LQ images a row.
        seed: of the first draw; the others have the seeds that follow.

    Raises:
        UserError: the folder holds pairs, or anything that is wrong with it, the degradation or the output's name.
    """
    output = png_path(output)  # before the work
    # Texts show in no picture: the protocol's prompts and captioner are not asked for.
    data = open_images(ProtocolRecipe(degradation=protocol.degradation), folder, scale)
    if data.items[0].lq is not None:
        raise UserError(f"'{folder}' holds pairs, which are not degraded: give a folder of HQ images")
    rows: list[list[Cell]] = []
    for drawn in range(draws):
        for place, batch in enumerate(data.validation(images, seed + drawn, side)):
            assert batch.hq is not None
            name = Path(batch.paths[0]).stem
            if not drawn:
                rows.append([(f"{name} HQ", batch.hq[0])])
            enlarged = F.interpolate(batch.lq, size=batch.hq.shape[-2:], mode="nearest-exact")[0]
            rows[place].append((f"LQ, seed {seed + drawn}", enlarged))
    return write_grid(rows, output)
