"""Pages of runs and evaluations that lie on the disk."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardsr.ending import last_validation, read_ending
from rewardsr.errors import UserError, shown
from rewardsr.evaluation.page.content import EvaluationView, Page, Picture, RunView, distinct
from rewardsr.evaluation.page.images import chosen, merged
from rewardsr.evaluation.report import Evaluation
from rewardsr.json_object import read_object
from rewardsr.run_folder import EVALUATION, METRICS, PICTURES, RECIPE, VALIDATION, VERSIONS
from rewardsr.storage import read_bytes, read_text

LARGEST = 2**30  # bytes of a file that is read
MOST_NOTES = 20  # of a run


def read_page(places: Sequence[Path], title: str | None = None) -> Page:
    """What runs and evaluations left behind, as one page; nothing is loaded or computed anew.

    Args:
        places: folders of runs, folders that `evaluate -o` wrote, or JSON files of an evaluation.
        title: heading; by default the names of the runs.

    Raises:
        UserError: one of them is something else, or damaged.
    """
    names = distinct([_name(place) for place in places])
    runs: list[RunView] = []
    evaluations: list[EvaluationView] = []
    pictures: dict[str, list[Picture]] = {}
    for name, place in zip(names, places, strict=True):
        if (place / RECIPE).is_file():
            runs.append(read_run(place, name))
            validation = last_validation(place, ".json")
            if validation is not None:
                evaluations.append(_read_evaluation(validation, name, runs[-1].margins))
                pictures[name] = list(_pictures_of_run(place, validation.stem, evaluations[-1]))
        else:
            whole = _evaluation(place)
            evaluations += [
                EvaluationView(name if system == "tuned" else system, whole.pair(system).to_dict())
                for system in whole.compared
            ]
            pictures[name] = list(_pictures(place, whole))
    held = {name: part for name, part in pictures.items() if part}
    shown_ones = chosen(merged(held) if held else [], evaluations[0] if evaluations else None)
    return Page(title or ", ".join(names), runs, evaluations, shown_ones)


def read_run(run: Path, name: str) -> RunView:
    """Recipe, versions, metrics and notes of a run, also of one that has not ended.

    Raises:
        UserError: it is not the folder of a run.
    """
    recipe = read_text(run / RECIPE, f"'{run / RECIPE}'")
    steps = list(_lines(run / METRICS)) if (run / METRICS).is_file() else []
    versions = read_object(run / VERSIONS) if (run / VERSIONS).is_file() else {}
    notes = [
        f"Step {line['step']}: {key.replace('_', ' ')}: {value}"
        for line in steps
        for key, value in line.items()
        if isinstance(value, str)
    ]
    view = RunView(name, recipe, {key: str(value) for key, value in versions.items()}, steps)
    last, planned = max((line["step"] for line in steps), default=0), view.recipe.get("steps")
    if isinstance(planned, int) and last < planned:
        notes.append(f"The run ends at step {last} of {planned}.")
    ending = read_ending(run)
    if ending is not None and ending.stopped is not None:
        notes.append(f"Stopped by its guards: {ending.stopped}. Its weights are those of step {ending.shipped}.")
    return RunView(name, recipe, view.versions, steps, notes[-MOST_NOTES:])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics; what is none (the last one of a run that is going on, cut off) is left out."""
    for line in read_bytes(path, f"'{path}'", LARGEST).splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content


def _name(place: Path) -> str:
    return place.stem if place.suffix == ".json" else place.resolve().name


def _evaluation(place: Path) -> Evaluation:
    if place.is_dir():
        place = place / EVALUATION
        if not place.is_file():
            raise UserError(f"'{place.parent}' is neither the folder of a run ({RECIPE}) nor of an evaluation")
    if not place.is_file():
        raise UserError(f"no such run or evaluation: '{place}'")
    return Evaluation.read(place)


def _read_evaluation(path: Path, name: str, margins: Mapping[str, float]) -> EvaluationView:
    view = EvaluationView(name, read_object(path) | {"margins": margins})
    try:
        if not view.evaluation.images or not view.evaluation.rewards:
            raise UserError("no images or no metrics")
    except UserError as error:
        raise UserError(f"'{path}' is not an evaluation: {error}") from error
    return view


def _pictures_of_run(run: Path, step: str, view: EvaluationView) -> Iterator[Picture]:
    """Single pictures of a validation ("step-00000100"), as `write_cells` left them."""
    folder = run / VALIDATION / PICTURES
    for place, name in enumerate(distinct(view.evaluation.images)):
        labels = {"LQ": "LQ", "base": "base", "tuned": step, "HQ": "HQ"}
        files = {label: folder / f"{place:04d}-{file}.webp" for label, file in labels.items()}
        images = {label: read_bytes(file, f"'{file}'", LARGEST) for label, file in files.items() if file.is_file()}
        if images:
            yield Picture(name, images, scores_of(view, place))


def _pictures(folder: Path, whole: Evaluation) -> Iterator[Picture]:
    """Pictures of an evaluation: `pictures/<system>/<image>.png`."""
    folders = [folder / PICTURES / label for label in ("LQ", *whole.scores, "HQ")]
    for place, name in enumerate(distinct(whole.images)):
        files = {path.name: path / f"{Path(whole.images[place]).stem}.png" for path in folders}
        images = {label: read_bytes(file, shown(str(file)), LARGEST) for label, file in files.items() if file.is_file()}
        scores = {
            system: {metric: values[place] for metric, values in of.items()} for system, of in whole.scores.items()
        }
        if images:
            yield Picture(name, images, scores)


def scores_of(view: EvaluationView, place: int) -> dict[str, dict[str, float]]:
    """What the image at a place scored, base and tuned."""
    rewards = view.evaluation.rewards.items()
    return {
        "base": {name: comparison.base[place] for name, comparison in rewards},
        "tuned": {name: comparison.tuned[place] for name, comparison in rewards},
    }
