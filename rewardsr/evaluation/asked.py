"""The systems that a command line names: runs, LoRAs at strengths, a base, bicubic, folders of images."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rewardsr.errors import UserError
from rewardsr.evaluation.systems import Bicubic, Images, Pipeline, Shelf, Source, System
from rewardsr.hub.fetch import fetch_lora, is_reference
from rewardsr.pipelines import weighted
from rewardsr.run_folder import FULL, LORA, RECIPE
from rewardsr.storage import expand
from rewardsr.train.recipe import Recipe, assignments_of, load_recipe


@dataclass(frozen=True)
class Pipelines:
    """How pipelines are opened; fields as of `rewardsr.pipelines.open_run`."""

    adapter: str = "osediff"
    base: str | None = None
    options: Sequence[str] = ()
    device: str = "auto"
    precision: str | None = None
    force_base: bool = False


@dataclass
class Asked:
    """What was asked for.

    Attributes:
        systems: by name; the first one is what the others are compared with.
        recipe: of the first run, which says how images are degraded.
        trained_on: rewards that steered the training of any run, as far as recipes tell.
        margins: those that recipes give their guards instead of the metrics' own; of several the smallest.
    """

    systems: dict[str, System] = field(default_factory=dict)
    recipe: Recipe | None = None
    trained_on: list[str] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)


def asked_for(
    pipelines: Pipelines,
    runs: Sequence[str] = (),
    loras: Sequence[str] = (),
    images: Sequence[str] = (),
    *,
    bicubic: bool = False,
    with_base: bool = True,
) -> Asked:
    """Systems by name, each as `what` or `name=what`: first the base of each pipeline, then all others as they came.

    Args:
        pipelines: how they are opened.
        runs: folders of runs, or references to the Hub; `:0.5` behind one is its strength.
        loras: LoRAs alike, on the pipeline of the first run, or of `pipelines`; `a:0.7+b:0.3` is the sum of two.
        images: folders of images that are there already.
        bicubic: LQ images enlarged, too.
        with_base: bases, too.

    Raises:
        UserError: nothing to evaluate, or something that is named is not there.
    """
    asked, shelf = Asked(), Shelf(pipelines.device, pipelines.precision, pipelines.force_base)
    tuned = [*_of_runs(asked, pipelines, runs), *(_of_lora(pipelines, runs, text) for text in loras)]
    keys = set[tuple[str, ...]]()
    if not tuned and pipelines.base is not None:
        _add(asked, "base", _pipeline(shelf, *_described(pipelines, None), base=True))
    for name, source, about in tuned if with_base else []:
        if source.key not in keys:
            shared = {key: about[key] for key in ("adapter", "base", "options", "precision")}
            _add(asked, f"base of {name}" if keys else "base", _pipeline(shelf, source, shared, base=True))
            keys.add(source.key)
    for name, source, about in tuned:
        _add(asked, name, _pipeline(shelf, source, about))
    if bicubic:
        _add(asked, "bicubic", Bicubic())
    for text in images:
        given, place = _named(text)
        _add(asked, given or _last_part(place), Images(place))
    return asked


def variants(pipelines: Pipelines, run: str | None, lora: str | None, key: str, values: Sequence[str]) -> Asked:
    """One pipeline with one setting at several values: `strength`, or an option of the adapter.

    Raises:
        UserError: as `asked_for`; no values, one that is no number where a strength is expected.
    """
    if len(set(values)) != len(values) or not values:
        raise UserError(f"--over {key}=...: give several values, each once, as 0,0.5,1")
    asked = Asked()
    runs = [] if run is None else [run]
    found = [*_of_runs(asked, pipelines, runs)]
    if lora is not None:
        asked.trained_on.clear()
        asked.margins.clear()
        found = [_of_lora(pipelines, runs, lora)]
    if not found:
        if key == "strength":
            raise UserError("a strength is that of a LoRA: give --run, or --lora")
        found = [("base", *_described(pipelines, None))]
    _, source, about = found[0]
    shelf = Shelf(pipelines.device, pipelines.precision, pipelines.force_base)
    for value in values:
        if key == "strength":
            changed = replace(source, strength=_number(key, value))
        else:
            option = f"{key}={value}"
            changed = replace(source, key=(*source.key, option), options=(*source.options, option))
        said = {**about, key: value}
        _add(asked, f"{key}={value}", _pipeline(shelf, changed, said))
    return asked


def _of_runs(asked: Asked, pipelines: Pipelines, runs: Sequence[str]) -> Iterator[tuple[str, Source, dict[str, Any]]]:
    """Name, source and description of each run; what its recipe says is noted."""
    for text in runs:
        name, what = _named(text)
        place, strength = weighted(what)
        recipe = _recipe(place)
        asked.recipe = asked.recipe or recipe
        steering = [entry.name for entry in recipe.rewards if entry.weight > 0]
        asked.trained_on += [reward for reward in steering if reward not in asked.trained_on]
        for guard in recipe.guards:
            if guard.margin is not None:
                asked.margins[guard.name] = min(guard.margin, asked.margins.get(guard.name, guard.margin))
        source, about = _described(pipelines, recipe)
        source = replace(source, run=place, strength=strength)
        yield name or _strong(_last_part(place), strength), source, {"run": place, "strength": strength, **about}


def _of_lora(pipelines: Pipelines, runs: Sequence[str], text: str) -> tuple[str, Source, dict[str, Any]]:
    name, what = _named(text)
    place, strength = weighted(what)
    parts = what.split("+")
    if len(parts) > 1 and not os.path.lexists(expand(place)):
        places, strength = tuple(parts), 1.0
        called = "+".join(_strong(_last_part(one), share) for one, share in map(weighted, parts))
    else:
        places, called = (place,), _strong(_last_part(place), strength)
    run = weighted(_named(runs[0])[1])[0] if runs else None
    source, about = _described(pipelines, _recipe(run) if run is not None else None)
    source = replace(source, run=run, loras=places, strength=strength)
    return name or called, source, {"loras": list(places), "strength": strength, **about}


def _described(pipelines: Pipelines, recipe: Recipe | None) -> tuple[Source, dict[str, Any]]:
    """Where a pipeline comes from, without run and LoRA, and the same as plain data."""
    if recipe is None and pipelines.base is None:
        raise UserError("say on which pipeline the LoRA sits: --base with a diffusers folder, a Hub id or 'embedded'")
    given = assignments_of(list(pipelines.options), "--option")
    settings = given if recipe is None else {**recipe.adapter_options, **given}
    about = {
        "adapter": pipelines.adapter if recipe is None else recipe.adapter,
        "base": pipelines.base or (recipe.base if recipe is not None else None),
        "options": settings,
        "precision": pipelines.precision or ("auto" if recipe is None else recipe.precision),
    }
    key = tuple(repr(value) for value in about.values())
    return Source(key, None, pipelines.adapter, pipelines.base, tuple(pipelines.options)), about


def _pipeline(shelf: Shelf, source: Source, about: Mapping[str, Any], *, base: bool = False) -> Pipeline:
    protocol = None if source.run is None else _recipe(source.run).data
    return Pipeline(partial(shelf.take, source), base=base, about=about, key=source.key, protocol=protocol)


def _add(asked: Asked, name: str, system: System) -> None:
    found, number = name, 2
    while found in asked.systems:
        found, number = f"{name}-{number}", number + 1
    asked.systems[found] = system


def _recipe(run: str) -> Recipe:
    folder = fetch_lora(run) if is_reference(run) else expand(run)
    return load_recipe(str(folder / RECIPE), {}, [])


def _named(text: str) -> tuple[str | None, str]:
    """Name and rest of `name=what`; a path that is there is one, whatever its name."""
    name, mark, what = text.partition("=")
    if not mark or "/" in name or os.path.lexists(expand(weighted(text)[0])):
        return None, text
    if not name or not what:
        raise UserError(f"'{text}': expected NAME=WHAT")
    return name, what


def _last_part(place: str) -> str:
    """What a folder, a file or a reference is called."""
    path = Path(place.partition("@")[0]) if is_reference(place) else expand(place)
    path = path.parent if path.name in (LORA, FULL) and len(path.parts) > 1 else path
    return (path.stem if path.is_file() else path.name) or path.resolve().name or "system"


def _strong(name: str, strength: float) -> str:
    return name if strength == 1 else f"{name}:{strength:g}"


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"--over {key}: '{value}' is not a number") from error
