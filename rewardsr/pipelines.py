"""Pipelines as the commands name them: of a run, or put together from adapter, base, options and LoRA."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rewardsr import lora as loras
from rewardsr import recipe as recipes
from rewardsr.adapter import ISRAdapter
from rewardsr.api import load_adapter
from rewardsr.errors import UserError
from rewardsr.files import write_folder
from rewardsr.plugins import names, resolve
from rewardsr.setup import RECIPE, choose_device


def open_pipeline(
    run: Path | None,
    adapter: str,
    base: str | None,
    options: list[str],
    lora: Path | None,
    strength: float,
    device: str,
    precision: str,
    force_base: bool,
) -> ISRAdapter:
    """Load a pipeline and, where there is one, its LoRA.

    Args:
        run: folder of a run; its recipe names adapter, base and options, and its LoRA is loaded.
        adapter, base, options: without a run; options are `key=value` strings.
        lora: LoRA file or folder, instead of the run's.
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
        recipe = recipes.load_recipe(str(run / RECIPE), {}, [])
        adapter, base, settings = recipe.adapter, recipe.base, dict(recipe.adapter_options)
        lora = run if lora is None else lora
    if base is None:
        raise UserError(
            "say which pipeline: --run FOLDER of a run, or --base with a diffusers folder, a Hub id or 'embedded'"
        )
    settings |= recipes.assignments_of(options, "--option")
    pipeline = load_adapter(adapter, base, device=chosen, dtype=dtype, **settings)
    if lora is not None:
        loras.load(pipeline, lora, strength, force_base)
    return pipeline


def merge_into(pipeline: ISRAdapter, output: Path) -> None:
    """Merge the LoRA and write all networks, in diffusers layout, to a new folder.

    Raises:
        UserError: the folder exists, it cannot be written to, or there is no LoRA.
    """
    if output.exists():
        raise UserError(f"'{output}' exists already: choose a new folder")
    loras.merge(pipeline)

    def fill(folder: Path) -> None:
        for component, network in pipeline.networks.items():
            try:
                network.save_pretrained(folder / component)  # type: ignore[operator]
            except SafetensorError as error:  # what a full disk looks like from inside safetensors
                raise OSError(f"{component}: {error}") from error

    write_folder(output, fill)


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
