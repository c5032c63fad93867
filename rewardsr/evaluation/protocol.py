"""Paired comparison of a pipeline before and after fine-tuning: same images, same noise, same colour fix.

`evaluate` does it once on a folder; training does it again and again on its held-out images (`HeldOut`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from scipy.special import stdtrit
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.degrade.contract import in_words
from rewardsr.data.protocol import open_images
from rewardsr.draws import Draws, seed_of
from rewardsr.errors import TrainingError, UserError, is_out_of_memory
from rewardsr.evaluation.offset import Offset, latent_offset, shifted
from rewardsr.evaluation.pictures import Cell, comparison_row, shown, write_cells, write_grid
from rewardsr.evaluation.report import CONFIDENCE, Cast, Comparison, Evaluation, OffsetTest
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.lora.layers import reference, tuned
from rewardsr.rewards import build
from rewardsr.rewards.base import Reward
from rewardsr.run_folder import PICTURES, VALIDATION
from rewardsr.storage import write_text
from rewardsr.together import everywhere
from rewardsr.train.recipe import ProtocolRecipe

Images = Callable[[int, int], Iterable[Batch]]
"""Called with (first, every): batches of one image, those at the positions first, first + every, ..."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def interval(differences: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t, which few images widen as they should.

    It holds 95 of 100 times for differences that are about normally distributed, with 4 images as with 400. A skewed
    few (exponential, 4 images) hold about 88 times.

    Args:
        differences: one number an image.

    Returns:
        (low, high); (NaN, NaN) for a single image, which says nothing about others.

    Raises:
        ValueError: no differences, or some that are not finite.
    """
    values = np.asarray(list(differences), dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"interval: expected one finite number an image, got {values.tolist()[:5]}")
    if values.size == 1:
        return math.nan, math.nan
    quantile = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2))
    mean, half = float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean - half, mean + half


def evaluate(
    adapter: ISRAdapter,
    data: Path | str,
    metrics: Sequence[str] = ("psnr", "ssim"),
    *,
    draws_per_image: int = 1,
    seed: int = 0,
    limit: int | None = None,
    side: int | None = None,
    protocol: ProtocolRecipe | None = None,
    prompts: str | None = None,
    cast: bool | Path | str = False,
) -> Evaluation:
    """Score base against tuned on a data folder, with the same noise; see `HeldOut`.

    Args:
        adapter: with a LoRA loaded.
        data: folder of pairs (`lq/`, `gt/`), of HQ images, which are degraded, or of `lq/` alone, for metrics that
            need no HQ images; or a list of paths.
        metrics: names of rewards or pyiqa metrics.
        draws_per_image: noise draws that a score is averaged over.
        seed: of degradation and noise.
        limit: the first so many images.
        side: cut larger images at the centre to this many HQ pixels a side.
        protocol: how images are degraded and prompted: `recipe.data` of a run, which its own validation goes by; by
            default the recipes' defaults.
        prompts: instead of the protocol's.
        cast: also tell how much of each gain one constant offset of the latents gives, the same for every image
            (`Evaluation.cast`); this samples each image six times instead of twice. The offset is the LoRA's mean
            change of the latents (`latent_offset`): True measures it on these images, where it fits them as well as
            a constant can, so that what is left is no accident of other images; a folder or list (the run's training
            images, say) on the images there, within the same limit and side.

    Raises:
        UserError: there is no LoRA, a folder or metric cannot be had or has no images, or as of `HeldOut`.
    """
    if not tuned(adapter):
        raise UserError("evaluate compares base and tuned, and this pipeline carries no LoRA: load one first")
    chosen = (protocol or ProtocolRecipe()).prompted(prompts)
    folder = open_images(chosen, data, adapter.scale, adapter.extras)
    source = folder if isinstance(cast, bool) else open_images(chosen, cast, adapter.scale, adapter.extras)
    rewards = {name: build(name) for name in metrics}
    made = "as they lie there" if folder.items[0].lq else in_words(chosen.degradation)
    logger.info("%s; LQ images: %s; prompts: %s", folder.said, made, chosen.prompts)
    images = partial(folder.validation, limit, seed, side)
    held_out = HeldOut(adapter, images, rewards, seed=seed, draws_per_image=draws_per_image, pictures=0)
    offset = None
    if cast is not False:
        for item in folder.items[:limit]:
            _check_hq(rewards, Path(str(item.shown)).name, item.hq is not None)
        count = len(source.items[:limit])
        where = f"the {count} images compared" if cast is True else f"{count} images of {cast}"
        logger.info("cast test: measuring the offset on %s", where)
        measured = source.validation(limit, seed, side)
        offset = latent_offset(adapter, measured, where, seed=seed, draws_per_image=draws_per_image)
    return held_out.score(offset=offset)


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
        if not rewards:
            raise UserError("nothing to evaluate with: name at least one reward")
        if draws_per_image < 1:
            raise ValueError(f"expected at least one draw an image, got {draws_per_image}")
        self._adapter, self._images, self._rewards, self._seed = adapter, images, rewards, seed
        self._draws = 1 if adapter.deterministic else draws_per_image
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
        rewards = {name: _compared(found, name, "base", "tuned") for name in self._rewards}
        cast = None if offset is None else _cast(found, rewards, offset)
        names = tuple(image.name for image in found)
        evaluation = Evaluation(names, rewards, self._seed, self._draws, self._color_fix, cast)
        everywhere(self._accelerator, lambda: self._write(step, evaluation))
        return evaluation

    @torch.no_grad()
    def _score_share(self, offset: Offset | None) -> dict[int, _Scored]:
        """The images of this process, by position."""
        first, every = 0, 1
        if self._accelerator is not None:
            first, every = self._accelerator.process_index, self._accelerator.num_processes
        share = {}
        try:
            for turn, batch in enumerate(self._images(first, every)):
                position = first + turn * every
                share[position] = self._score_image(position, batch, offset)
        except Exception as error:
            if self._memory_advice is None or not is_out_of_memory(error):
                raise
            raise TrainingError(self._memory_advice) from error
        return share

    def _score_image(self, position: int, batch: Batch, offset: Offset | None) -> _Scored:
        name = Path(batch.paths[0]).name if batch.paths else f"image {position}"
        if len(batch) != 1:
            raise ValueError(f"expected batches of one image, got {len(batch)}")
        _check_hq(self._rewards, name, batch.hq is not None)
        batch = batch.to(self._adapter.device)
        if position not in self._base:
            with self._reference():
                scores, sr = self._score_side(position, batch, f"{name} (base)")
            self._base[position] = scores, shown(sr[0], self._side) if position < self._pictures else None
        tuned, sr = self._score_side(position, batch, f"{name} (tuned)")
        base, picture = self._base[position]
        sides = {"base": base, "tuned": tuned}
        if offset is not None:
            with self._reference(), shifted(self._adapter, offset.numbers):
                sides["alone"], _ = self._score_side(position, batch, f"{name} (base + offset)")
            with shifted(self._adapter, -offset.numbers):
                sides["without"], _ = self._score_side(position, batch, f"{name} (tuned - offset)")
        cells: list[Cell] = []
        if picture is not None:
            hq = None if batch.hq is None else batch.hq[0]
            cells = comparison_row(batch.lq[0], picture, sr[0], hq, Path(name).stem, self._side)
        return _Scored(name, sides, cells)

    def _score_side(self, position: int, batch: Batch, where: str) -> tuple[dict[str, float], Tensor]:
        """Scores of the pipeline as it is, averaged over the draws, and `sr` (1, 3, H, W) of the first draw."""
        scores = dict.fromkeys(self._rewards, 0.0)
        first: Tensor | None = None
        for draw in range(self._draws):
            source = Draws(self._seed, draw, [position], "evaluate")
            sr = upscale_tensor(self._adapter, batch, generator=source, color_fix=self._color_fix)
            first = sr if first is None else first
            # A metric that draws at random (MANIQA its crops) sees base and tuned alike, in any process and step.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self._seed, draw, "metrics", position))
                for name, reward in self._rewards.items():
                    scores[name] += _score(name, reward, sr, batch, where) / self._draws
        assert first is not None
        return scores, first

    def _write(self, step: int, evaluation: Evaluation) -> None:
        if self._run is None or (self._accelerator is not None and not self._accelerator.is_main_process):
            return
        folder = self._run / VALIDATION
        write_grid(self.rows[:4], folder / f"step-{step:08d}.png")
        write_cells(self.rows, folder / PICTURES, step)
        write_text(folder / f"step-{step:08d}.json", evaluation.to_json())


def _check_hq(rewards: Mapping[str, Reward], name: str, there: bool) -> None:
    """Refuse rewards that need the HQ image which this image has not."""
    needing = [] if there else [key for key, reward in rewards.items() if reward.needs_hq]
    if needing:
        raise UserError(f"{', '.join(needing)} compare with an HQ image, and {name} has none: leave them out")


def _compared(found: Sequence[_Scored], reward: str, before: str, after: str) -> Comparison:
    """One side against another on all images."""
    base, tuned = (tuple(image.scores[side][reward] for image in found) for side in (before, after))
    return Comparison(base, tuned, *interval(late - early for early, late in zip(base, tuned, strict=True)))


def _cast(found: Sequence[_Scored], gains: Mapping[str, Comparison], offset: Offset) -> Cast:
    pairs = (("base", "alone"), ("base", "without"), ("alone", "tuned"))
    tests = {name: OffsetTest(gain, *(_compared(found, name, *pair) for pair in pairs)) for name, gain in gains.items()}
    return Cast(tuple(offset.numbers.tolist()), offset.measured_on, tests)


def _score(name: str, reward: Reward, sr: Tensor, batch: Batch, where: str) -> float:
    scores = reward(sr, batch)
    if tuple(scores.shape) != (1,):
        raise ValueError(f"reward '{name}': expected scores of shape (1,), got {tuple(scores.shape)}")
    score = float(scores)
    if not math.isfinite(score):
        raise TrainingError(f"reward '{name}' gave {score} for {where}")
    return score
