"""RFSR: timestep-aware reward feedback learning for super-resolution (arXiv 2412.03268).

A step of the sampler is drawn; the pipeline denoises down to it without gradients, then takes that one step with
gradients to x0, which is decoded and judged: early steps by low-frequency structure against HQ, late ones by
differentiable rewards, held back by the distance of style from what the pipeline made before fine-tuning. The moving
average of the LoRA is what is validated and shipped.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch, Condition, cut
from rewardsr.draws import Source, draw
from rewardsr.errors import TrainingError, UserError
from rewardsr.options import Options
from rewardsr.rewards.base import Reward
from rewardsr.rewards.distances import structure, style_distance
from rewardsr.rewards.vgg import VGG19
from rewardsr.trainers.base import Loss, Method, MicroBatch, Scalar
from rewardsr.trainers.ema import EMA
from rewardsr.transfer import to_device

_Step = Annotated[int, Field(ge=-10_000, le=10_000)]  # the pipeline says which it has
Window = tuple[_Step, _Step]
SMALLEST = 16  # pixels that VGG19 halves four times
FINE = 2**24  # a uniform number is a whole one below this, divided by it


class RFSROptions(Options):
    """Options of RFSR; the defaults are the paper's. Windows are (first, last) step of the sampler, counted from 0."""

    structure_weight: float = Field(
        5e-4, ge=0, le=1e6, description="of the low-frequency structure term; 0 switches it off"
    )
    structure_window: Window | None = Field(None, description="steps it acts on; null: the first 2/5 (0-19 of 50)")
    structure_level: int = Field(3, ge=1, le=6, description="levels of the Haar transform whose low band is compared")
    reward_window: Window | None = Field(None, description="steps the rewards act on; null: the last 1/5 (40-49 of 50)")
    margin: float = Field(2.0, ge=-1e6, le=1e6, description="a reward counts as weight * relu(margin - reward)")
    kl_weight: float = Field(
        5e-7, ge=0, le=1e6, description="of the style distance (Gram-KL) to the untuned pipeline; 0: off"
    )
    kl_window: Window | None = Field(None, description="steps it acts on; null: those of the rewards")
    vgg: str | None = Field(None, description="VGG19 weights for the style distance; null: torchvision's")
    rollout: Literal["denoise", "none"] = Field(
        "denoise", description="none: the start latents go in at every step, as the released code has it; to compare"
    )
    guidance: float | None = Field(None, ge=1, le=1000, description="of the rollout; null: the pipeline's own")
    text_dropout: float = Field(0.5, ge=0, le=1, description="share of the images whose prompt is left empty")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the average that is validated and shipped; 0: none")
    reward_crop: int | None = Field(
        None,
        ge=16,
        le=16_384,
        description="decode and judge a random window of so many pixels a side, not the whole image",
    )
    micro_batch: MicroBatch = Field(
        "auto",
        description="images in a pass with gradients; auto: as many as fit the card, on a CPU all; null: the whole "
        "batch",
    )


@dataclass(frozen=True)
class Group:
    """What `prepare` leaves for the losses; B images, all without gradients.

    Attributes:
        condition: of the B images.
        batch: with the prompts that the networks saw.
        z_t: (B, C, h, w) latents as they enter the drawn step.
        step: (B,) index of that step in the schedule.
        corner: (B, 2) top left corner of the window that is judged, in latent pixels.
        metrics: what to log of the preparation.
    """

    condition: Condition
    batch: Batch
    z_t: Tensor
    step: Tensor
    corner: Tensor
    metrics: dict[str, Scalar]


class RFSR(Method):
    """The method: `prepare` rolls out to a drawn step, `losses` judges what one more step gives.

    Rewards are differentiable; the weight of each is that of its hinge (the paper: clipiqa 5e-5, imagereward 5e-6).

    Raises:
        UserError: windows outside the schedule, nothing to train on, or VGG19 weights that cannot be had.
    """

    Options = RFSROptions
    differentiates = True
    options: RFSROptions

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: RFSROptions
    ) -> None:
        super().__init__(adapter, rewards, weights, options)
        self.windows = windows(options, len(adapter.steps), bool(rewards))
        self._enabled = torch.tensor(
            sorted({step for first, last in self.windows.values() for step in range(first, last + 1)})
        )
        if options.reward_crop is not None and options.reward_crop % self._grid():
            raise UserError(f"reward_crop is {options.reward_crop}: expected a multiple of {self._grid()} pixels")
        self._vgg = VGG19(options.vgg).to(adapter.device) if "kl" in self.windows else None
        self._ema = EMA(self.trained[0].parameters, options.ema)

    @classmethod
    def needs_hq(cls, options: RFSROptions) -> str | None:
        """The structure term."""
        return "the structure term (trainer_options.structure_weight)" if options.structure_weight else None

    # ---- the loop's side ----

    @torch.no_grad()
    def prepare(self, batch: Batch, draws: Source) -> Group:
        """Draw a step for every image and denoise down to it under the policy, guided as at inference.

        Raises:
            UserError: the images are smaller than what is to be judged.
            TrainingError: HQ images are missing.
        """
        adapter, count = self.adapter, len(batch)
        if batch.hq is None and "structure" in self.windows:
            raise TrainingError("rfsr's structure term needs HQ images")
        step = self._enabled[draw((count, 1), draws, high=len(self._enabled)).flatten()]
        dropped = draw((count, 1), draws, high=FINE).flatten() < self.options.text_dropout * FINE
        prompts = batch.prompts if batch.prompts is not None else (None,) * count
        texts = tuple("" if drop else text for drop, text in zip(dropped.tolist(), prompts, strict=True))
        batch = replace(batch, prompts=texts)
        condition = adapter.encode(batch, generator=draws)
        self.check_size(condition.size)
        if self.options.rollout == "none":
            z_t = adapter.start(condition, draws)
        else:
            z_t = adapter.sample_latents(
                condition,
                draws,
                guidance=self.options.guidance,
                until=step,
                rows=self.micro_batch,
            )
        metrics: dict[str, Scalar] = {f"share/{name}": self._inside(name, step).mean() for name in self.windows}
        return Group(condition, batch, z_t, step, self._corners(condition, draws), metrics)

    def losses(self, group: Group, draws: Source) -> Iterator[Loss]:
        """The terms of `micro_batch` images at a time; each is to be back-propagated at once."""
        count = len(group.condition)
        for rows in torch.arange(count).split(self.micro_batch or count):
            yield self._loss(group, rows, len(rows) / count)

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images, height and width in pixels, that are smaller than what is to be judged.

        Raises:
            UserError: they are.
        """
        crop, least = self.options.reward_crop, 2**self.options.structure_level
        if crop is not None and crop > min(size):
            raise UserError(f"rfsr: reward_crop is {crop}, but the images have {size[0]}x{size[1]} pixels: lower it")
        judged = min(size) if crop is None else crop
        if "structure" in self.windows and judged < least:
            raise UserError(f"rfsr: {judged} pixels are too few for structure_level {self.options.structure_level}")
        if "kl" in self.windows and judged < SMALLEST:
            raise UserError(
                f"rfsr: the style distance needs {SMALLEST} pixels a side, not {judged}; or set kl_weight=0"
            )

    def after_update(self) -> None:
        """Take the LoRA into its average."""
        self._ema.update()

    def shipped(self) -> AbstractContextManager[None]:
        """Inside, the adapter carries the average."""
        return self._ema.applied()

    def state_dict(self) -> dict[str, Tensor]:
        """The average."""
        return self._ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self._ema.load_state_dict(state)

    # ---- one step with gradients ----

    def _loss(self, group: Group, rows: Tensor, weight: float) -> Loss:
        style = self._reference_style(group, rows)
        sr = self._image(group, rows)
        batch = self._judged(group, rows)
        terms: dict[str, Tensor] = {}
        if "structure" in self.windows:
            assert batch.hq is not None
            inside = to_device(self._inside("structure", group.step[rows]), sr.device)
            distance = structure(sr, batch.hq, self.options.structure_level)
            terms["structure"] = self.options.structure_weight * (distance * inside).mean()
        if "reward" in self.windows:
            inside = self._inside("reward", group.step[rows])
            terms |= self._hinges(sr, batch, inside.nonzero().flatten())
        if "kl" in self.windows:
            terms["kl"] = self._style(sr, style, group.step[rows])
        total = torch.stack(list(terms.values())).sum()
        # Shares of the loss, which are 0 outside a term's window: the same names in every step and process.
        metrics: dict[str, Scalar] = {"loss": total.detach()}
        metrics |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        return Loss(total * weight, metrics, weight)

    def _hinges(self, sr: Tensor, batch: Batch, inside: Tensor) -> dict[str, Tensor]:
        """Each reward's term, averaged over all rows of `sr`; only rows in the window are scored."""
        nothing = sr.sum() * 0
        if not len(inside):
            return dict.fromkeys(self.rewards, nothing)
        judged, part = sr[to_device(inside, sr.device)], batch.rows(inside)
        return {
            name: self.weights[name] * hinge(reward(judged, part).float(), self.options.margin).sum() / len(sr)
            for name, reward in self.rewards.items()
        }

    def _reference_style(self, group: Group, rows: Tensor) -> dict[str, Tensor] | None:
        """Features of what the untuned pipeline makes of the same latents at the same step, of the rows in the window.

        Asked before the policy, whose graph would be held meanwhile.
        """
        if "kl" not in self.windows:
            return None
        assert self._vgg is not None
        inside = self._inside("kl", group.step[rows]).nonzero().flatten()
        if not len(inside):
            return None
        # All rows, as the policy has them: in another batch shape equal weights would differ in the last bits. And not
        # under no_grad, where a compiled network would be another graph.
        with self.reference():
            sr = self._image(group, rows).detach()
        return self._vgg(sr[to_device(inside, sr.device)])

    def _style(self, sr: Tensor, reference: dict[str, Tensor] | None, step: Tensor) -> Tensor:
        """Distance in style from the untuned pipeline, averaged over all rows of `sr`."""
        if reference is None:
            return sr.sum() * 0
        assert self._vgg is not None
        inside = self._inside("kl", step).nonzero().flatten()
        distance = style_distance(self._vgg(sr[to_device(inside, sr.device)]), reference)
        return self.options.kl_weight * distance.sum() / len(sr)

    def _image(self, group: Group, rows: Tensor) -> Tensor:
        """x0 of one unguided step, decoded: what is judged of `sr`, (R, 3, h, w) in [0, 1]."""
        adapter, places = self.adapter, to_device(rows, group.z_t.device)
        z_t, condition = group.z_t[places], group.condition.rows(places)
        t = to_device(adapter.schedule.times(adapter.steps)[group.step[rows]], z_t.device)
        z0 = adapter.schedule.x0(z_t, adapter.predict(z_t, t, condition), t)
        if self.options.reward_crop is None:
            return adapter.decode(z0, condition)
        side = self.options.reward_crop // adapter.compression
        return adapter.to_image(cut(z0, group.corner[rows], side)).clamp(0, 1)

    def _judged(self, group: Group, rows: Tensor) -> Batch:
        """The batch as far as it is judged: the same windows of `lq` and `hq`."""
        batch, crop = group.batch.rows(rows), self.options.reward_crop
        if crop is None:
            return batch
        return batch.crop(group.corner[rows] * self.adapter.compression, crop, self.adapter.scale)

    # ---- draws ----

    def _inside(self, name: str, step: Tensor) -> Tensor:
        first, last = self.windows[name]
        return ((step >= first) & (step <= last)).float()

    def _grid(self) -> int:
        """Windows lie on pixels of both latents and `lq`."""
        return math.lcm(self.adapter.compression, self.adapter.scale)

    def _corners(self, condition: Condition, draws: Source) -> Tensor:
        """(B, 2) corners of the judged windows, in latent pixels."""
        crop, width = self.options.reward_crop, self.adapter.compression
        if crop is None:
            return torch.zeros(len(condition), 2, dtype=torch.int64)
        places = []
        for length in condition.size:
            free = (length - crop) // self._grid() + 1
            places.append(draw((len(condition), 1), draws, high=free) * (self._grid() // width))
        return torch.cat(places, 1)


def hinge(scores: Tensor, margin: float) -> Tensor:
    """relu(margin - score) (B,): a reward counts until it reaches the margin."""
    return (margin - scores).relu()


def windows(options: RFSROptions, steps: int, rewarded: bool) -> dict[str, Window]:
    """The window of each term that is switched on ("structure", "reward", "kl"), as (first, last) step.

    By default the structure term has the first two fifths of the steps and rewards the last fifth, each at least one:
    0-19 and 40-49 of 50. A one-step pipeline has all of them at its only step.

    Args:
        options: of the method.
        steps: of the pipeline's sampler.
        rewarded: whether there are rewards to train with.

    Raises:
        UserError: a window that is empty or outside the schedule, or no term at all.
    """
    late = options.reward_window or (steps - max(1, steps // 5), steps - 1)
    found: dict[str, Window] = {}
    if options.structure_weight > 0:
        found["structure"] = options.structure_window or (0, max(1, steps * 2 // 5) - 1)
    if rewarded:
        found["reward"] = late
    if options.kl_weight > 0:
        found["kl"] = options.kl_window or late
    for name, (first, last) in found.items():
        if not 0 <= first <= last < steps:
            raise UserError(
                f"rfsr: {name}_window is {first} to {last}, but the pipeline's steps are 0 to {steps - 1}: "
                "give [first, last] within them, or None"
            )
    if not found.keys() & {"structure", "reward"}:
        raise UserError("rfsr has nothing to train on: give a reward a positive weight, or set structure_weight")
    return found
