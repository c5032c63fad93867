"""TensorBoard and Weights & Biases, through accelerate's trackers: numbers, pictures, and the recipe."""

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from rewardsr.data.images import to_uint8
from rewardsr.errors import UserError, one_line
from rewardsr.evaluation.pictures import Cell, grid
from rewardsr.train.recipe import Recipe, to_yaml

logger = logging.getLogger(__name__)

PROJECT = "rewardsr"  # in Weights & Biases, unless WANDB_PROJECT says another


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is absent.

    Raises:
        UserError: one is.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"log_with {name}: the package is not installed; pip install 'rewardsr[{name}]'")


class Trackers:
    """The trackers of a run, those that its recipe asks for.

    TensorBoard's files lie in the run's folder, whose name is that of the run there (`tensorboard --logdir runs`);
    those of Weights & Biases in `wandb/` in it.

    Args:
        run: the run's folder.
        recipe: of the run.
        start: steps that a resumed run has behind it; what an earlier attempt told of later ones is dropped.

    Raises:
        UserError: a tracker cannot be started.
    """

    def __init__(self, run: Path, recipe: Recipe, start: int) -> None:
        self._opened: list[Any] = []
        name = recipe.run_name or run.absolute().name
        for kind in recipe.log_with:
            try:
                self._opened.append(_opened(kind, run, name, start))
            except Exception as error:  # a service, with errors of its own
                self.finish()
                raise UserError(f"log_with {kind}: cannot be started: {one_line(error)}") from error
        for tracker in self._opened:
            if tracker.name == "wandb":
                tracker.store_init_configuration(recipe.model_dump(mode="json"))
            else:  # its form of hyperparameters is flat, and a folder of its own for each start
                tracker.log({"recipe": f"```yaml\n{to_yaml(recipe)}```"}, step=start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        for tracker in self._opened:
            tracker.log(dict(values), step=step)

    def show(self, rows: Sequence[Sequence[Cell]], step: int) -> None:
        """Pictures of a validation: of each image a row, LQ beside base, policy and HQ."""
        for row in rows if self._opened else ():
            pictures = {f"validation/{row[0][0].removesuffix(' LQ') or 'image'}": _pixels(grid([row]))}
            for tracker in self._opened:
                tracker.log_images(pictures, step=step, **({} if tracker.name == "wandb" else {"dataformats": "NHWC"}))

    def finish(self) -> None:
        """Close them; what is left to send is sent."""
        for tracker in self._opened:
            tracker.finish()


def _opened(kind: str, run: Path, name: str, start: int) -> Any:
    """accelerate's tracker of this kind, started."""
    made = LOGGER_TYPE_TO_CLASS[kind]
    if kind == "wandb":
        tracker = made(os.environ.get("WANDB_PROJECT", PROJECT), name=name, dir=str(run))
    else:
        own = run.absolute() if name == run.absolute().name else run.absolute() / name
        tracker = made(own.name, own.parent, purge_step=start + 1 if start else None)
    if hasattr(tracker, "start"):  # versions of accelerate before 1.7 open a tracker when it is made
        tracker.start()
    return tracker


def _pixels(image: Tensor) -> Any:
    """(1, H, W, 3) uint8 of (3, H, W) in [0, 1]."""
    return to_uint8(image).permute(1, 2, 0)[None].numpy()
