"""Paired comparison of a pipeline before and after fine-tuning: same images, same noise, same colour fix.

Training does it again and again on its held-out images; `rewardsr.evaluation.evaluate` scores other systems as well.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from rewardsr import progress
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.errors import TrainingError, UserError, is_out_of_memory
from rewardsr.evaluation.offset import Offset, cast_of, shifted
from rewardsr.evaluation.pictures import Cell, comparison_row, shown, write_cells, write_grid
from rewardsr.evaluation.report import Evaluation
from rewardsr.evaluation.scoring import Scorer, by_metric, check_hq, image_name, negated
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.lora.layers import reference
from rewardsr.rewards.base import Reward
from rewardsr.run_folder import PICTURES, VALIDATION
from rewardsr.storage import write_text
from rewardsr.together import everywhere

Images = Callable[[int, int], Iterable[Batch]]
"""Called with (first, every): batches of one image, those at the positions first, first + every, ..."""


@dataclass(frozen=True)
class _Scored:
    """One image: its name, its scores by side ("base", "tuned", ...) and reward, and pictures where it is shown."""

    name: str
    scores: dict[str, dict[str, float]]
    cells: list[Cell]


class HeldOut:
    """Images on which base and tuned are scored from the same noise, once or again and again.

    Processes share the images: process r of n scores those at the positions r, r + n, ..., one at a time, and every
    process gets the scores of all. N processes find the same numbers as one, bit for bit. What the base makes of an
    image is scored at the first call and kept.

    Args:
        adapter: the pipeline with its LoRA on.
        images: see `Images`; the same ones at every call.
        rewards: by the name they get in the table.
        count: how many images there are, for a bar; None: no bar.
        seed: the noise of image i in draw d is seeded by (seed, d, i).
        draws_per_image: scores are averaged over so many draws of noise; a pipeline without noise takes one.
        color_fix: "none", "adain" or "wavelet".
        base: a context in which the pipeline is the one to compare with; our LoRA off by default.
        accelerator: the processes that share the images; None: this one alone.
        run: the run's folder: `score` writes pictures and scores of a step to `validation/` there.
        pictures: the first so many images are shown, enlarged LQ beside base, tuned and HQ; in a run's grid the first
            four of them.
        picture_side: pictures are cut at the centre to this many pixels a side; None: not at all.
        memory_advice: text of the TrainingError that is raised where memory runs out; None: torch's own error.

    Attributes:
        rows: the pictures of the last `score`, a row an image, for `write_grid`.

    Raises:
        UserError: no rewards.
        ValueError: fewer than one draw.
    """

    def __init__(
        self,
        adapter: ISRAdapter,
        images: Images,
        rewards: Mapping[str, Reward],
        *,
        count: int | None = None,
        seed: int = 0,
        draws_per_image: int = 1,
        color_fix: str = "none",
        base: Callable[[], AbstractContextManager[None]] | None = None,
        accelerator: Accelerator | None = None,
        run: Path | None = None,
        pictures: int = 12,
        picture_side: int | None = 512,
        memory_advice: str | None = None,
    ) -> None:
        self._scorer = Scorer(rewards, seed, min(draws_per_image, 1) if adapter.deterministic else draws_per_image)
        self._adapter, self._images, self._count = adapter, images, count
        self._color_fix, self._accelerator, self._run = color_fix, accelerator, run
        self._reference = base or partial(reference, adapter)
        self._pictures, self._side, self._memory_advice = pictures, picture_side, memory_advice
        self._base: dict[int, tuple[dict[str, float], Tensor | None]] = {}  # scores and, where it is shown, picture
        self.rows: list[list[Cell]] = []

    def score(self, step: int = 0, offset: Offset | None = None) -> Evaluation:
        """Score every image before and after fine-tuning; equal in every process.

        `sr` is scored as floating point, not as an 8-bit file.

        Args:
            step: of the run, for the names of its files.
            offset: what it gives is scored as well (`Evaluation.cast`): added to the base's latents, and taken from
                those of the tuned pipeline; the same one in every process.

        Raises:
            UserError: no images, a reward needs HQ images that are not there, or a file cannot be read or written.
            TrainingError: a score is not finite (reward, image and side are named), or the memory was not enough.
            ValueError: a batch of several images, or a reward that breaks the contract.
        """
        scored: dict[int, _Scored] = {}
        for share in everywhere(self._accelerator, partial(self._score_share, offset)):
            scored |= share
        if not scored:
            raise UserError("nothing to evaluate: there are no images")
        found = [scored[position] for position in sorted(scored)]
        self.rows = [image.cells for image in found if image.cells]
        names = tuple(image.name for image in found)
        sides = {side: by_metric([image.scores[side] for image in found]) for side in found[0].scores}
        scores = {side: sides[side] for side in ("base", "tuned")}
        casts = {} if offset is None else {"tuned": cast_of(sides, offset)}
        scorer = self._scorer
        evaluation = Evaluation(
            names, scores, scorer.seed, scorer.draws, self._color_fix, casts, negated=negated(scorer.rewards)
        )
        everywhere(self._accelerator, lambda: self._write(step, evaluation))
        return evaluation

    @torch.no_grad()
    def _score_share(self, offset: Offset | None) -> dict[int, _Scored]:
        """The images of this process, by position."""
        first, every = 0, 1
        if self._accelerator is not None:
            first, every = self._accelerator.process_index, self._accelerator.num_processes
        share = {}
        bar: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
        if self._count is not None:
            bar = progress.bar("validation" if offset is None else "cast test", len(range(first, self._count, every)))
        try:
            with bar as advance:
                for turn, batch in enumerate(self._images(first, every)):
                    position = first + turn * every
                    share[position] = self._score_image(position, batch, offset)
                    advance()
        except Exception as error:
            if self._memory_advice is None or not is_out_of_memory(error):
                raise
            raise TrainingError(self._memory_advice) from error
        return share

    def _score_image(self, position: int, batch: Batch, offset: Offset | None) -> _Scored:
        name = image_name(batch, position)
        check_hq(self._scorer.rewards, name, batch.hq is not None)
        batch = batch.to(self._adapter.device)
        if position not in self._base:
            with self._reference():
                scores, sr = self._scorer(self._make, position, batch, f"{name} (base)")
            self._base[position] = scores, shown(sr[0], self._side) if position < self._pictures else None
        tuned, sr = self._scorer(self._make, position, batch, f"{name} (tuned)")
        base, picture = self._base[position]
        sides = {"base": base, "tuned": tuned}
        if offset is not None:
            with self._reference(), shifted(self._adapter, offset.numbers):
                sides["alone"], _ = self._scorer(self._make, position, batch, f"{name} (base + offset)")
            with shifted(self._adapter, -offset.numbers):
                sides["without"], _ = self._scorer(self._make, position, batch, f"{name} (tuned - offset)")
        cells: list[Cell] = []
        if picture is not None:
            hq = None if batch.hq is None else batch.hq[0]
            cells = comparison_row(batch.lq[0], picture, sr[0], hq, Path(name).stem, self._side)
        return _Scored(name, sides, cells)

    def _make(self, batch: Batch, position: int, draw: int) -> Tensor:
        source = Draws(self._scorer.seed, draw, [position], "evaluate")
        return upscale_tensor(self._adapter, batch, generator=source, color_fix=self._color_fix)

    def _write(self, step: int, evaluation: Evaluation) -> None:
        if self._run is None or (self._accelerator is not None and not self._accelerator.is_main_process):
            return
        folder = self._run / VALIDATION
        write_grid(self.rows[:4], folder / f"step-{step:08d}.png")
        write_cells(self.rows, folder / PICTURES, step)
        write_text(folder / f"step-{step:08d}.json", evaluation.to_json())
