"""Named protocols: everything that published numbers depend on besides the pipeline and the images, in one place.

Between two correct evaluations of the same images lie more than half a decibel of PSNR and other scales of one metric's
name, by what is set here. A protocol does not change: another setting gets another name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError, nearest
from rewardsr.evaluation.colour import _check_color_fix, fix_color
from rewardsr.evaluation.fid import FID, FrechetDistance
from rewardsr.rewards import build
from rewardsr.rewards.base import Reward

EightBit = Literal["none", "round", "truncate"]
"""How an image in [0, 1] becomes one of 256 levels: not at all, to the nearest (ours), or to the one below."""


@dataclass(frozen=True)
class Convention:
    """How outputs are finished and scored.

    Attributes:
        name: of the protocol.
        follows: whose numbers it is meant to be compared with, and where it was read.
        metrics: ids as of `rewardsr.rewards.build`, with the options of each; "fid" besides.
        luma: `psnr` and `ssim` are taken on Y of BT.601 YCbCr in studio range; else on RGB, as pyiqa does that.
        crop_border: pixels that are cut off at each side before `psnr` and `ssim` are taken.
        color_fix: "none", "adain" or "wavelet", against the enlarged LQ image, on the whole image.
        before_fix: 8 bits of the pipeline's output, before the colours are fixed.
        after_fix: 8 bits of what is scored.
        enlarged: 8 bits of the LQ image that colours are taken from, enlarged bicubically with antialiasing (PIL's).
        sizes: what happens to images of odd sizes, in words.
        prompts: as of a recipe; None: as the run has them, else the adapter's own.
    """

    name: str
    follows: str
    metrics: Mapping[str, Mapping[str, Any]]
    luma: bool = True
    crop_border: int = 0
    color_fix: str = "none"
    before_fix: EightBit = "none"
    after_fix: EightBit = "none"
    enlarged: EightBit = "none"
    sizes: str = "as they are: sr and hq have one size, or are refused"
    prompts: str | None = None

    def finish(self, sr: Tensor, enlarged: Tensor) -> Tensor:
        """What is scored of a pipeline's output.

        Args:
            sr: (B, 3, H, W) in [0, 1].
            enlarged: the LQ images at the size of `sr`, in [0, 1].
        """
        if self.color_fix == "none":
            # Once only: what is on a level already may come out one below when it is truncated again.
            return to_levels(sr, self.after_fix if self.before_fix == "none" else self.before_fix)
        fixed = fix_color(to_levels(sr, self.before_fix), to_levels(enlarged, self.enlarged), self.color_fix)
        return to_levels(fixed, self.after_fix)

    def built(
        self, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> tuple[dict[str, Reward], FrechetDistance | None]:
        """Its metrics, all of them, built before any work: those of single images, and FID where it is one.

        Args:
            options: more options by metric: `weights` of one that cannot be downloaded, say.

        Raises:
            UserError: some cannot be had; all are named, with the way to get them.
        """
        unknown = [name for name in options or {} if name not in self.metrics]
        if unknown:
            raise UserError(f"options are given for '{unknown[0]}', and the metrics are {', '.join(self.metrics)}")
        _check_color_fix(self.color_fix)
        built, of_sets, failed = dict[str, Reward](), None, dict[str, UserError]()
        for name, own in self.metrics.items():
            try:
                if name == FID:
                    of_sets = FrechetDistance()
                else:
                    built[name] = self._build(name, {**own, **(options or {}).get(name, {})})
            except UserError as error:
                failed[name] = error
        if failed:
            raise UserError(_cannot_be_had(self.name, failed))
        return built, of_sets

    def to_dict(self) -> dict[str, Any]:
        """Every setting, for the file, and which of them are not those of the protocol of this name."""
        frozen = CONVENTIONS.get(self.name, self)
        changed = [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(frozen, entry.name)]
        return {**asdict(self), "changed": changed}

    def _build(self, name: str, options: Mapping[str, Any]) -> Reward:
        if name not in ("psnr", "ssim"):
            return build(name, **options)
        on_rgb = {} if self.luma else {"test_y_channel": False}
        reward = build(name if self.luma else f"iqa:{name}", **{**on_rgb, **options})
        return _Cropped(reward, self.crop_border) if self.crop_border else reward


class _Cropped:
    """A metric of what is left of images when their borders are cut off; attributes as of `Reward`."""

    def __init__(self, reward: Reward, border: int) -> None:
        self._reward, self._border = reward, border
        self.name, self.kind, self.needs_hq = reward.name, reward.kind, reward.needs_hq
        self.licence, self.differentiable = reward.licence, reward.differentiable

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        border = self._border
        if min(sr.shape[-2:]) <= 2 * border:
            raise UserError(f"crop_border {border} leaves nothing of an image of {sr.shape[-1]}x{sr.shape[-2]} pixels")

        def inside(image: Tensor) -> Tensor:
            return image[..., border:-border, border:-border]

        return self._reward(inside(sr), Batch(batch.lq, None if batch.hq is None else inside(batch.hq)))


def to_levels(image: Tensor, how: EightBit) -> Tensor:
    """An image in [0, 1] on the 256 levels of 8 bits, as floating point.

    Args:
        image: any shape.
        how: "round" to the nearest; "truncate" to the one below, as torchvision's conversion to PIL does it, which is
            half a level darker on average; "none" leaves it as it is.
    """
    if how == "none":
        return image
    levels = image.float().clamp(0, 1) * 255
    return (levels.round() if how == "round" else levels.to(torch.uint8).float()) / 255


_TABLE = ("psnr", "ssim", "lpips", "dists", FID, "niqe", "musiq", "maniqa-pipal", "clipiqa")  # of most papers

_OSEDIFF = Convention(
    "osediff",
    "OSEDiff's test_osediff.py and test_metrics.py (pyiqa 0.1.10); differs: LQ images below 128 pixels a side, which "
    "are enlarged first there, are taken as they are",
    {name: {} for name in _TABLE},
    color_fix="adain",
    before_fix="truncate",
    after_fix="truncate",
    enlarged="round",
)

CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("plain", "a run's own validation: floating point, no colour fix", {"psnr": {}, "ssim": {}}),
        _OSEDIFF,
        Convention(
            "seesr",
            "SeeSR's test_seesr.py, whose pipeline rounds before the colours are fixed, and the metrics of its paper, "
            "which were taken as OSEDiff's are; differs as of osediff",
            {name: {} for name in _TABLE},
            color_fix="adain",
            before_fix="round",
            after_fix="truncate",
            enlarged="round",
        ),
        Convention(
            "gdpo-sr",
            "GDPO-SR's test.py, which finishes images as OSEDiff does; its repository scores nothing, so the metrics "
            "are those it is rewarded with (maniqa is KonIQ's there), and held-out ones; differs as of osediff",
            {name: {} for name in ("psnr", "ssim", "lpips", "dists", FID, "niqe", "musiq", "maniqa", "clipiqa")},
            color_fix="adain",
            before_fix="truncate",
            after_fix="truncate",
            enlarged="round",
        ),
    )
}


def find_convention(name: str | Convention) -> Convention:
    """The named protocol; one of your own as it is.

    Raises:
        UserError: there is none of this name.
    """
    if isinstance(name, Convention):
        return name
    if name not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise UserError(f"unknown protocol '{name}': {nearest(name, CONVENTIONS, f'choose one of {known}')}")
    return CONVENTIONS[name]


def _cannot_be_had(name: str, failed: Mapping[str, UserError]) -> str:
    first, *others = failed
    rest = f"; nor can {', '.join(others)}" if others else ""
    return (
        f"protocol '{name}': {failed[first]}{rest}: nothing has been scored; --metric-option NAME.weights=PATH gives "
        "weights, --metrics names the metrics to take instead"
    )
