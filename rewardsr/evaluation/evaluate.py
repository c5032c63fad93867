"""Scoring one system or several on the same images and noise: `rewardsr.evaluate`, `rewardsr evaluate` and `sweep`."""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rewardsr import __version__, progress
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.degrade.contract import in_words
from rewardsr.data.folder import Data
from rewardsr.data.items import centre
from rewardsr.data.protocol import open_images
from rewardsr.errors import UserError
from rewardsr.evaluation.cast import Cast
from rewardsr.evaluation.conventions import Convention, find_convention
from rewardsr.evaluation.fid import FID, FrechetDistance
from rewardsr.evaluation.offset import Offset, cast_of, latent_offset, shifted
from rewardsr.evaluation.report import Evaluation
from rewardsr.evaluation.results import HQ, LQ, Results
from rewardsr.evaluation.scoring import Scorer, by_metric, check_hq, image_name, negated, own_margins
from rewardsr.evaluation.systems import Images, Opened, Pipeline, System, Wanted, systems_of
from rewardsr.lora.layers import reference
from rewardsr.rewards.base import Reward
from rewardsr.run_folder import PICTURES
from rewardsr.train.recipe import ProtocolRecipe

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pyiqa")

Sides = dict[str, dict[str, tuple[float, ...]]]
"""Scores of all images by side of a system ("own"; "alone" and "without" in a cast test) and metric."""


def evaluate(
    systems: ISRAdapter | Mapping[str, System],
    data: Path | str,
    metrics: Sequence[str] | None = None,
    *,
    convention: str | Convention = "plain",
    color_fix: str | None = None,
    metric_options: Mapping[str, Mapping[str, Any]] | None = None,
    draws_per_image: int = 1,
    seed: int = 0,
    limit: int | None = None,
    side: int | None = None,
    scale: int = 4,
    protocol: ProtocolRecipe | None = None,
    prompts: str | None = None,
    cast: bool | Path | str = False,
    trained_on: Sequence[str] = (),
    margins: Mapping[str, float] | None = None,
    output: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Score systems on a data folder, on the same images and with the same noise, and compare them with the first one.

    Args:
        systems: a pipeline with a LoRA, whose base it is compared with, or without; or systems by name (see
            `rewardsr.evaluation.systems`). One at a time is in memory.
        data: folder of pairs (`lq/`, `gt/`), of HQ images, which are degraded, or of `lq/` alone, for metrics that
            need no HQ images; or a list of paths.
        metrics: names of rewards or pyiqa metrics, instead of the convention's.
        convention: a named protocol ("plain", "osediff", "seesr", "gdpo-sr"), or one of your own.
        color_fix: instead of the convention's.
        metric_options: by metric its options (`weights`, say).
        draws_per_image: noise draws that a score is averaged over.
        seed: of degradation and noise.
        limit: the first so many images.
        side: cut larger images at the centre to this many HQ pixels a side.
        scale: HQ is this many times LQ, where no system is a pipeline, which says so itself.
        protocol: how images are degraded and prompted: `recipe.data` of a run, which its own validation goes by; by
            default the recipes' defaults. A system that has one of its own is prompted by that.
        prompts: instead of the protocols'.
        cast: also tell how much of each gain one constant offset of the latents gives, the same for every image
            (`Evaluation.casts`), for every LoRA on the base that comes first; this samples each image six times
            instead of twice. The offset is the LoRA's mean change of the latents (`latent_offset`): True measures it
            on these images, where it fits them as well as a constant can, so that what is left is no accident of other
            images; a folder or list (the run's training images, say) on the images there, within the same limit and
            side.
        trained_on: metrics that steered the training of a system; tables show them apart.
        margins: how far a metric's mean may fall before the page counts it, instead of the metric's own margin.
        output: new folder for tables and pictures (see `rewardsr.evaluation.results`), or one with an evaluation of
            the same settings, which is made again.
        device: for what is no pipeline.

    Raises:
        UserError: no systems, a folder, metric or image cannot be had, images do not fit, or the output has other
            results; all before any work, but for what only a pipeline can tell.
    """
    chosen = _chosen(find_convention(convention), metrics, color_fix)
    systems = systems_of(systems) if isinstance(systems, ISRAdapter) else dict(systems)
    _check(systems, cast)
    rewards, of_sets = chosen.built(metric_options)
    with _kept(output, of_sets is not None) as results:
        first = next((system.take() for system in systems.values() if isinstance(system, Pipeline)), None)
        if first is not None:
            scale, device = first.scale, first.device
        prompts = prompts if prompts is not None else chosen.prompts
        asked = (protocol or ProtocolRecipe()).prompted(prompts)
        images = _Images(data, asked, scale, limit, side, seed, prompts)
        wanted = Wanted(chosen, seed, scale, torch.device(device))
        work = _Work(systems, images, wanted, rewards, draws_per_image, cast, results)
        settings = work.checked(first) | {"metric_options": {k: dict(v) for k, v in (metric_options or {}).items()}}
        del first  # the next pipeline may need its memory
        if results is not None:
            results.begin(settings)
        evaluation = work.done(settings, trained_on, margins or {}, of_sets)
        if output is not None and results is not None:
            results.finish(evaluation)
        return evaluation


@contextmanager
def _kept(output: Path | str | None, needed: bool) -> Iterator[Results | None]:
    """Where results go; without an output to a folder that goes, too, if they are needed for a while."""
    if output is not None:
        yield Results(output)
    elif needed:
        with tempfile.TemporaryDirectory(prefix="rewardsr-") as folder:
            yield Results(folder)
    else:
        yield None


def _chosen(found: Convention, metrics: Sequence[str] | None, color_fix: str | None) -> Convention:
    """A convention with what was chosen instead of its own."""
    if metrics is not None:
        found = replace(found, metrics={name: found.metrics.get(name, {}) for name in metrics})
    return found if color_fix is None else replace(found, color_fix=color_fix)


def _check(systems: Mapping[str, System], cast: bool | Path | str) -> None:
    if not systems:
        raise UserError("nothing to evaluate: name a run, a LoRA, a base, bicubic or a folder of images")
    for name in systems:
        if name in (LQ, HQ) or not name or name.startswith(".") or "/" in name or "\0" in name:
            raise UserError(f"a system cannot be called '{name}', which is also the name of a folder: choose another")
    if cast is False:
        return
    base = next(iter(systems.values()))
    loras = [system for system in systems.values() if isinstance(system, Pipeline) and not system.base]
    if not loras:
        raise UserError("the cast test is that of a LoRA, and no system carries one: load one first")
    if not isinstance(base, Pipeline) or not base.base or any(system.key != base.key for system in loras):
        raise UserError("the cast test compares with the base: let it come first, and all LoRAs be on this one base")


@dataclass(frozen=True)
class _Images:
    """The images of an evaluation."""

    place: Path | str
    protocol: ProtocolRecipe
    scale: int
    limit: int | None
    side: int | None
    seed: int
    prompts: str | None

    def opened(self, system: System, adapter: ISRAdapter | None, place: Path | str | None = None) -> Data:
        """The images, prompted as a system has it, with the tensors that it takes; degraded alike for all."""
        asked = self.protocol
        if adapter is None:
            asked = asked.prompted("adapter")  # nobody reads them
        elif system.protocol is not None:
            asked = system.protocol.prompted(self.prompts).model_copy(update={"degradation": asked.degradation})
        extras = () if adapter is None else adapter.extras
        return open_images(asked, self.place if place is None else place, self.scale, extras)

    def of(self, data: Data) -> Iterator[Batch]:
        """Batches of one image."""
        return data.validation(self.limit, self.seed, self.side)

    def described(self, data: Data) -> dict[str, Any]:
        """Names and sizes, and what tells this data from any other."""
        listed = []
        for item in data.items[: self.limit]:
            _, (height, width) = centre(item.size, data.scale, self.side, 1)
            listed.append({"name": Path(str(item.shown)).name, "width": width, "height": height})
        made = "as they lie there" if data.items[0].lq else in_words(self.protocol.degradation)
        return {
            "place": str(self.place),
            "identity": data.identity(),
            "lq": made,
            "scale": self.scale,
            "limit": self.limit,
            "side": self.side,
            "images": listed,
        }


@dataclass(frozen=True)
class _Work:
    """An evaluation in all its parts."""

    systems: Mapping[str, System]
    images: _Images
    wanted: Wanted
    rewards: Mapping[str, Reward]
    draws: int
    cast: bool | Path | str
    results: Results | None

    def checked(self, first: ISRAdapter | None) -> dict[str, Any]:
        """Refuse what cannot be done; else the settings, as plain data."""
        images = self.images
        leader = next((system for system in self.systems.values() if isinstance(system, Pipeline)), None)
        system = leader or next(iter(self.systems.values()))
        data = images.opened(system, first)
        described = images.described(data)
        if not isinstance(self.cast, bool):
            images.opened(system, first, self.cast)
        logger.info("%s; LQ images: %s; prompts: %s", data.said, described["lq"], images.protocol.prompts)
        names = [Path(str(item.shown)).name for item in data.items[: images.limit]]
        for item, name in zip(data.items, names, strict=False):
            check_hq(self.rewards, name, item.hq is not None)
            if FID in self.wanted.convention.metrics and item.hq is None:
                raise UserError(f"{FID} compares with HQ images, and {name} has none: leave it out")
        if FID in self.wanted.convention.metrics and len(names) < 2:
            raise UserError(f"{FID} compares sets of images, and there is one: leave it out")
        if self.results is not None or any(isinstance(system, Images) for system in self.systems.values()):
            twice = [stem for stem, count in Counter(Path(name).stem for name in names).items() if count > 1]
            if twice:
                raise UserError(f"{len(twice)} names are those of several images ({', '.join(twice[:3])}): rename some")
        for system in self.systems.values():
            system.check(data, images.limit, images.side)
        return {
            "protocol": self.wanted.convention.to_dict(),
            "data": described,
            "prompts": images.protocol.prompts,
            "systems": {name: system.described() for name, system in self.systems.items()},
            "seed": self.wanted.seed,
            "draws_per_image": self.draws,
            "cast": self.cast if isinstance(self.cast, bool) else str(self.cast),
            "device": str(self.wanted.device),
            "versions": {"rewardsr": __version__} | {name: _version(name) for name in _PACKAGES},
        }

    @torch.no_grad()
    def done(
        self,
        settings: Mapping[str, Any],
        trained_on: Sequence[str],
        margins: Mapping[str, float],
        of_sets: FrechetDistance | None,
    ) -> Evaluation:
        """Score everything."""
        listed = [entry["name"] for entry in settings["data"]["images"]]
        watched = [name for name in self.rewards if name not in trained_on]
        allowed = {**own_margins(self.rewards), **margins}
        sides, weights, casts, draws = dict[str, Sides](), dict[str, Mapping[str, str]](), dict[str, Cast](), 1
        with progress.bar("evaluate", len(self.systems) * len(listed)) as advance:
            for name in self.systems:
                sides[name], weights[name], taken, offset = self._system(name, advance)
                draws = max(draws, taken)
                if offset is not None:
                    own = {"base": next(iter(sides.values()))["own"], "tuned": sides[name]["own"]}
                    casts[name] = cast_of(own | sides[name], offset)
        return Evaluation(
            images=tuple(listed),
            scores={name: scores["own"] for name, scores in sides.items()},
            seed=self.wanted.seed,
            draws_per_image=draws,
            color_fix=self.wanted.convention.color_fix,
            casts=casts,
            sets={} if of_sets is None else self._of_sets(of_sets),
            negated=(*negated(self.rewards), *([FID] if of_sets is not None else [])),
            trained_on=tuple(name for name in self.wanted.convention.metrics if name in trained_on),
            margins={name: allowed[name] for name in watched if name in allowed},
            settings=settings,
            weights=weights,
        )

    def _system(self, name: str, advance: progress.Advance) -> tuple[Sides, Mapping[str, str], int, Offset | None]:
        """A system's scores, its weights' hashes, its draws an image, and what it is tested for being."""
        # Its pipeline is held here alone: the next one may need the memory.
        system, images = self.systems[name], self.images
        with system.opened(self.wanted) as opened:
            if opened.adapter is not None and opened.adapter.scale != images.scale:
                raise UserError(
                    f"'{name}' enlarges {opened.adapter.scale} times, and the first pipeline {images.scale} times: "
                    "evaluate them apart"
                )
            if self.results is not None:
                self.results.check_weights(name, opened.weights)
            noisy = opened.adapter is not None and not opened.adapter.deterministic
            scorer = Scorer(self.rewards, self.wanted.seed, self.draws if noisy else min(self.draws, 1))
            offset = self._offset(system, opened)
            found = self._scored(name, system, opened, scorer, offset, advance)
            sides = {side: by_metric([scores[side] for scores in found]) for side in found[0]}
            return sides, opened.weights, scorer.draws, offset

    def _scored(
        self,
        system_name: str,
        system: System,
        opened: Opened,
        scorer: Scorer,
        offset: Offset | None,
        advance: progress.Advance,
    ) -> list[dict[str, dict[str, float]]]:
        """A system's scores of every image, by side."""
        found = []
        for position, batch in enumerate(self.images.of(self.images.opened(system, opened.adapter))):
            name = image_name(batch, position)
            if self.results is not None and system is next(iter(self.systems.values())):
                self.results.picture(LQ, name, batch.lq)
                if batch.hq is not None:
                    self.results.picture(HQ, name, batch.hq)
            batch = batch.to(self.wanted.device)
            scores: dict[str, dict[str, float]] = {}
            scores["own"], sr = scorer(opened.make, position, batch, f"{name} ({system_name})")
            if self.results is not None:
                self.results.picture(system_name, name, sr)
            if offset is not None and opened.adapter is not None:
                with reference(opened.adapter), shifted(opened.adapter, offset.numbers):
                    scores["alone"], _ = scorer(opened.make, position, batch, f"{name} (base + offset)")
                with shifted(opened.adapter, -offset.numbers):
                    scores["without"], _ = scorer(opened.make, position, batch, f"{name} ({system_name} - offset)")
            found.append(scores)
            advance(note=f"{system_name}  {name}")
        return found

    def _offset(self, system: System, opened: Opened) -> Offset | None:
        """The LoRA's mean change of the latents, where the cast test was asked for."""
        if self.cast is False or opened.adapter is None or not isinstance(system, Pipeline) or system.base:
            return None
        place = None if isinstance(self.cast, bool) else self.cast
        source = self.images.opened(system, opened.adapter, place)
        count = len(source.items[: self.images.limit])
        where = f"the {count} images compared" if place is None else f"{count} images of {place}"
        logger.info("cast test: measuring the offset on %s", where)
        measured: Iterable[Batch] = self.images.of(source)
        return latent_offset(
            opened.adapter, measured, where, count=count, seed=self.wanted.seed, draws_per_image=self.draws
        )

    def _of_sets(self, distance: FrechetDistance) -> dict[str, dict[str, float]]:
        assert self.results is not None
        pictures = self.results.folder / PICTURES
        return {name: {FID: -distance(pictures / name, pictures / HQ, self.wanted.device)} for name in self.systems}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
