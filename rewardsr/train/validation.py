"""Held-out validation during training: the policy, not the samples it learns from, scored and looked at."""

from pathlib import Path
from typing import Any

from torch import Tensor

from rewardsr.adapter import Batch
from rewardsr.evaluation.protocol import compare
from rewardsr.evaluation.report import Cell, comparison_row, write_grid
from rewardsr.run_folder import VALIDATION as FOLDER
from rewardsr.storage import write_text
from rewardsr.train.prepare import Setup

PICTURES, PICTURE_SIDE = 4, 512


class Validator:
    """Scores base and policy on the held-out images, with the same noise every time.

    Args:
        setup: of the run.
        run: its folder; pictures and tables go to `run/validation/`.
    """

    def __init__(self, setup: Setup, run: Path) -> None:
        self._setup, self._run = setup, run
        self.latest: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether there are held-out images."""
        return self._setup.validation is not None

    def score(self, step: int) -> dict[str, Any]:
        """Per metric: mean over the images of base and policy, their difference and its 95 % interval.

        The main process does it, one image at a time, so that the peak of the memory stays that of one image.
        """
        setup, rows = self._setup, list[list[Cell]]()
        if setup.validation is None or not setup.accelerator.is_main_process:
            setup.accelerator.wait_for_everyone()
            return {}

        def keep(position: int, batch: Batch, base: Tensor, tuned: Tensor) -> None:
            if position < PICTURES:
                hq = None if batch.hq is None else batch.hq[0]
                rows.append(comparison_row(batch.lq[0], base[0], tuned[0], hq))

        recipe = setup.recipe
        images = setup.validation.validation(recipe.data.validation_limit, recipe.seed, recipe.data.validation_side)
        with setup.method.shipped():
            found = compare(setup.adapter, images, setup.metrics, seed=recipe.seed, on_image=keep)
        folder = self._run / FOLDER
        write_grid(rows, folder / f"step-{step:08d}.png", side=PICTURE_SIDE)
        write_text(folder / f"step-{step:08d}.json", found.to_json())
        content = found.to_dict()["rewards"]
        self.latest = {
            name: {key: entry[key] for key in ("base_mean", "tuned_mean", "difference", "interval")}
            for name, entry in content.items()
        }
        setup.accelerator.wait_for_everyone()
        return self.latest
