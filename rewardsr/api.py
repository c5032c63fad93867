"""The Python API: `load_adapter`, `wrap`, `load_lora`, `finetune`, `upscale`, `evaluate`, as the commands have it."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from rewardsr import lora
from rewardsr import recipe as recipes
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.files import remove_leftovers, write_text
from rewardsr.plugins import names, resolve
from rewardsr.recipe import Recipe

if TYPE_CHECKING:
    from rewardsr.evaluation import Evaluation
    from rewardsr.training import DryRun, Result

LOADING = {"weights", "revision"}  # options of adapters that a live pipeline has no use for


def load_adapter(
    name: str,
    base: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ISRAdapter:
    """Load a pipeline behind the adapter interface.

    Args:
        name: registered adapter ("osediff"), or `module:Name`.
        base: local diffusers folder, Hub id, or "embedded" for the small pipeline that comes along.
        device: where the networks go.
        dtype: precision that they compute in; a LoRA stays float32.
        options: of the adapter's own `load`; osediff: weights, noise_t, net_t, scale, prompt, revision.

    Raises:
        UserError: unknown adapter or option, or the base cannot be had, read or fitted.
    """
    given = {key: value for key, value in adapter_options(name, options).items() if key in options}
    adapter: ISRAdapter = resolve("adapters", name).load(str(base), **given)
    return adapter.to(device, dtype)


def wrap(pipe: Any, name: str | None = None, **options: Any) -> ISRAdapter:
    """Put a pipeline that is in memory already behind the adapter interface.

    Its networks are shared, not copied: a LoRA trained or loaded through the adapter works in the pipeline, too. They
    stay on their device and in their precision, and are frozen.

    Args:
        pipe: an object with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`, as diffusers' pipelines are.
        name: registered adapter, or `module:Name`; by default the one that fits.
        options: of the adapter's own `load`, but for what is loaded from where.

    Raises:
        UserError: no adapter fits (the known ones are named), several do, or parts or options do not.
    """
    kinds = {key: resolve("adapters", key) for key in (names("adapters") if name is None else [name])}
    fitting = [key for key, kind in kinds.items() if name is not None or _fits(kind, pipe)]
    if len(fitting) != 1:
        found = f"these do: {', '.join(fitting)}; give name=" if fitting else f"known: {', '.join(kinds)}"
        raise UserError(f"expected one adapter that fits {type(pipe).__name__}; {found} (or give name='module:Name')")
    kind = kinds[fitting[0]]
    for option in LOADING & options.keys():
        raise UserError(f"wrap: '{option}' says what to load, and this pipeline is in memory already: leave it out")
    checked = adapter_options(fitting[0], options)
    adapter: ISRAdapter = kind.from_pipeline(pipe, **{key: checked[key] for key in options})
    return adapter


def _fits(kind: Any, pipe: Any) -> bool:
    try:
        return bool(kind.fits(pipe))
    except Exception:  # the object may be anything, with any attributes
        return False


def load_lora(
    target: Any, source: Path | str | Mapping[str, float], scale: float = 1.0, force_base: bool = False
) -> ISRAdapter:
    """Load a LoRA, or several, into an adapter or a live pipeline.

    Args:
        target: an adapter, or a pipeline object, which is wrapped first (see `wrap`) and works with the LoRA as it is.
        source: file, folder of a run, or "user/name[@revision]" on the Hub; or several of them with their weights.
        scale: strength, of all.
        force_base: load although it was trained on other base weights.

    Returns:
        The adapter.

    Raises:
        UserError: as `wrap` and `rewardsr.lora.load`.
    """
    adapter = target if isinstance(target, ISRAdapter) else wrap(target)
    if isinstance(source, Mapping):
        from rewardsr.formats import load_several

        load_several(adapter, [(one, scale * weight) for one, weight in source.items()], force_base)
    else:
        lora.load(adapter, source, scale, force_base)
    return adapter


def finetune(
    recipe: Recipe | Mapping[str, Any] | str | Path, *, resume: bool = False, dry_run: bool = False
) -> "Result | DryRun":
    """Fine-tune a pipeline.

    Args:
        recipe: a Recipe, a mapping of the same keys, or the path of a YAML file.
        resume: go on with the run in the recipe's output folder, if there is one.
        dry_run: take one step, measure it, and write nothing.

    Raises:
        UserError: anything wrong with the recipe or what it names, before long work begins.
        TrainingError: training cannot go on; checkpoints stay.
    """
    if isinstance(recipe, str | Path):
        recipe = recipes.load_recipe(str(recipe), {}, [])
    elif not isinstance(recipe, Recipe):
        recipe = recipes.parse(Recipe, dict(recipe), "recipe")
    from rewardsr.setup import RECIPE, check_output, set_up
    from rewardsr.training import rehearse, train

    if not dry_run:
        check_output(recipe, resume)
    setup = set_up(recipe)
    if dry_run:
        return rehearse(setup)
    run = Path(recipe.output)
    setup.accelerator.wait_for_everyone()  # until every process has looked into the folder, nothing may be written
    if setup.accelerator.is_main_process:
        remove_leftovers(run)
        write_text(run / RECIPE, recipes.to_yaml(recipe))
    return train(setup, run, resume)


def upscale(
    adapter: ISRAdapter,
    inputs: Sequence[Path | str],
    output: Path | str,
    *,
    color_fix: str = "none",
    seed: int = 0,
    prompts: str = "adapter",
    overwrite: bool = False,
    progress: Callable[[int, int, Path], None] | None = None,
) -> list[Path]:
    """Super-resolve image files or folders of them into a folder; see `rewardsr.upscaling.upscale_files`."""
    from rewardsr.images import list_images
    from rewardsr.upscaling import upscale_files

    files: list[Path] = []
    for entry in map(Path, inputs):
        files += list_images(entry) if entry.is_dir() else [entry]
    return upscale_files(
        adapter,
        files,
        output,
        seed=seed,
        color_fix=color_fix,
        prompts=prompts,
        overwrite=overwrite,
        progress=progress,
    )


def evaluate(
    adapter: ISRAdapter,
    data: Path | str,
    metrics: Sequence[str] = ("psnr", "ssim"),
    *,
    draws_per_image: int = 1,
    seed: int = 0,
    limit: int | None = None,
    prompts: str = "adapter",
) -> "Evaluation":
    """Score base against tuned on a data folder, with the same noise; see `rewardsr.evaluation.evaluate`.

    Args:
        adapter: with a LoRA loaded.
        data: folder of pairs (`lq/`, `gt/`), or of HQ images, which are degraded with the default settings.
        metrics: names of rewards or pyiqa metrics.
        draws_per_image: noise draws that a score is averaged over.
        seed: of degradation and noise.
        limit: the first so many images.
        prompts: "adapter", "sidecar" (text files), or one text for all.
    """
    from rewardsr.evaluation import evaluate as run
    from rewardsr.recipe import LightRecipe
    from rewardsr.rewards import build
    from rewardsr.setup import degradation_for, open_data

    degradation = degradation_for(str(data), LightRecipe(), adapter.scale)
    folder = open_data(data, scale=adapter.scale, degradation=degradation, prompts=prompts, extras=adapter.extras)
    rewards = {name: build(name) for name in metrics}
    return run(adapter, folder.validation(limit, seed), rewards, seed=seed, draws_per_image=draws_per_image)


def adapter_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an adapter's `load`, checked against its signature, defaults filled in.

    Args:
        name: registered adapter, or `module:Name`.
        given: what was chosen; values of the right kind may come as text.

    Raises:
        UserError: unknown adapter, an option that it does not have (the nearest is named), or a value of another type.
    """
    kind = resolve("adapters", name)
    if not callable(getattr(kind, "load", None)):
        raise UserError(f"adapter '{name}' has no `load(base, ...)`: expected a class like rewardsr.ISRAdapter")
    parameters = {
        key: entry
        for key, entry in inspect.signature(kind.load).parameters.items()
        if key != "base" and entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)
    }
    chosen = {key: entry.default for key, entry in parameters.items() if entry.default is not entry.empty}
    for key, value in given.items():
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(parameters) or 'none'}"
            raise UserError(f"adapter '{name}' has no option '{key}': {hint}")
        try:
            # A path is as good as its text, and text is what recipes and LoRA files hold.
            chosen[key] = _type_of(kind.load, key).validate_python(str(value) if isinstance(value, Path) else value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"adapter '{name}': {key} is {value!r}: {message[:1].lower()}{message[1:]}") from error
    missing = [key for key in parameters if key not in chosen]
    if missing:
        raise UserError(f"adapter '{name}' needs the option '{missing[0]}'")
    return chosen


def _type_of(function: Callable[..., Any], parameter: str) -> TypeAdapter[Any]:
    """What checks a parameter's values; anything passes where it says no type, or one that cannot be checked."""
    try:
        return TypeAdapter(get_type_hints(function).get(parameter, Any))
    except (NameError, TypeError, PydanticUserError):
        return TypeAdapter(Any)
