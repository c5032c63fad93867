"""Pipelines as the commands name them: of a run, or put together from adapter, base, options and LoRA."""

import math
import re
from pathlib import Path
from typing import Any

from rewardsr import hub
from rewardsr import lora as loras
from rewardsr import recipe as recipes
from rewardsr.adapter import ISRAdapter
from rewardsr.api import load_adapter
from rewardsr.errors import UserError
from rewardsr.formats import load_several
from rewardsr.plugins import names, resolve
from rewardsr.recipe import Recipe
from rewardsr.setup import RECIPE, choose_device

CODE = re.compile(r"[\w.]+:[\w.]+")  # module:Name


def open_pipeline(
    run: str | None,
    adapter: str,
    base: str | None,
    options: list[str],
    lora: list[str],
    strength: float,
    device: str,
    precision: str,
    force_base: bool,
) -> ISRAdapter:
    """Load a pipeline and, where there is one, its LoRA.

    Args:
        run: folder of a run, or "user/name[@revision]" on the Hub; its recipe names adapter, base and options, and its
            LoRA is loaded.
        adapter, base, options: without a run; options are `key=value` strings.
        lora: LoRA files, folders or Hub references, instead of the run's; `:weight` behind one is its share.
        strength: scale of the LoRA.
        device, precision: as in a recipe.
        force_base: load the LoRA although it belongs to another base.

    Raises:
        UserError: neither run nor base, or anything that cannot be had.
    """
    if not math.isfinite(strength):
        raise UserError(f"strength is {strength}, expected a finite number")
    chosen, dtype = choose_device(device, precision)
    settings: dict[str, Any] = {}
    if run is not None:
        if base is not None:
            raise UserError("give --run or --base, not both")
        folder = hub.fetch_lora(run) if hub.is_reference(run) else Path(run).expanduser()
        recipe = recipes.load_recipe(str(folder / RECIPE), {}, [])
        if hub.is_reference(run):
            _refuse_code(recipe, run)
        adapter, base, settings = recipe.adapter, recipe.base, dict(recipe.adapter_options)
        lora = lora or [str(folder)]
    if base is None:
        raise UserError(
            "say which pipeline: --run FOLDER of a run, or --base with a diffusers folder, a Hub id or 'embedded'"
        )
    settings |= recipes.assignments_of(options, "--option")
    pipeline = load_adapter(adapter, base, device=chosen, dtype=dtype, **settings)
    parts = [weighted(text) for text in lora]
    if len(parts) == 1:
        loras.load(pipeline, parts[0][0], strength * parts[0][1], force_base)
    elif parts:
        load_several(pipeline, [(source, strength * weight) for source, weight in parts], force_base)
    return pipeline


def _refuse_code(recipe: Recipe, run: str) -> None:
    """A stranger's recipe must not choose what is imported and called here: registered names only.

    `module:Name` reaches everything that is installed, `torch:hub` for one, whose `load` runs code from the network.
    """
    for value in (recipe.adapter, *recipe.adapter_options.values()):
        if isinstance(value, str) and CODE.fullmatch(value):
            raise UserError(
                f"the run '{run}' names code, '{value}', which a run from the Hub may not: pull it, look at its "
                "recipe.yaml, and give --adapter, --base, --option and --lora yourself"
            )


def weighted(text: str) -> tuple[str, float]:
    """A LoRA and its weight, of `source` (weight 1) or `source:0.7`.

    Raises:
        UserError: the weight is not finite.
    """
    source, _, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:  # no weight; a colon may be the path's own
        return text, 1.0
    if not source:
        return text, 1.0
    if not math.isfinite(value):
        raise UserError(f"--lora {text}: the weight is not a finite number")
    return source, value


def describe_adapters() -> list[tuple[str, str]]:
    """Name and first line of the documentation of every registered adapter; why, of one that does not load."""
    described = []
    for name in names("adapters"):
        try:
            text = (resolve("adapters", name).__doc__ or "").strip()
        except Exception as error:  # of another package: a list is no place to stop at a stranger's mistake
            text = f"does not load: {error}"
        described.append((name, text.partition("\n")[0]))
    return described
