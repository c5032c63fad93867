"""NAOSD: supervised training of a one-step base, the first stage of GDPO-SR (arXiv 2603.16769); OSEDiff with no noise.

Loss = MSE + 2 LPIPS + VSD of `sr` against HQ. Variational score distillation (ProlificDreamer, arXiv 2305.16213; for
super-resolution OSEDiff, arXiv 2406.08177) moves the latents of `sr` to where the frozen text-to-image base finds them
likelier than a second LoRA does, the fake score, which learns in the same step what the outputs look like. Both are the
one network: base, base with that LoRA, and base with what is trained.

Two more terms are 0 as published: the energy score of two draws of an image, a distribution term that needs no teacher,
for a base that knows no pictures or a pipeline whose draws shall differ; and the distance of the reward `perceptual`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch, Condition, parts
from rewardsr.draws import Source, draw
from rewardsr.errors import TrainingError, UserError
from rewardsr.options import Options
from rewardsr.rewards import lpips, perceptual
from rewardsr.rewards.base import Reward
from rewardsr.schedule import VP
from rewardsr.trainers.base import Loss, Method, MicroBatch, ParameterGroup, Scalar
from rewardsr.trainers.distillation import ENERGY_SMALLEST, energy_loss, vsd_loss

FAKE = "fake"  # the LoRA that is the fake score
INSTEAD = (
    "give trainer_options.vgg=FILE and trainer_options.lpips=FILE, or leave the term out with "
    "trainer_options.lpips_weight=0 (outputs get softer)"
)
_Weight = Annotated[float, Field(ge=0, le=1e6)]
_Share = Annotated[float, Field(ge=0, le=1)]


class NAOSDOptions(Options):
    """Options of the trainer; the defaults are GDPO-SR's and OSEDiff's."""

    mse_weight: _Weight = Field(
        1.0, description="of the squared error of images in [-1, 1]; 0: nothing holds colours and places exactly"
    )
    lpips_weight: _Weight = Field(
        2.0, description="of LPIPS on VGG16; 0: outputs get softer, and no weights are needed"
    )
    vsd_weight: _Weight = Field(
        1.0,
        description="of variational score distillation; 0: no texture that the base would draw but HQ does not force, "
        "and a shorter step. A base that starts random teaches nothing: 0 there",
    )
    energy_weight: _Weight = Field(
        0.0,
        description="of the energy score of two draws of each image, which is least where draws are distributed as HQ "
        "is, given LQ; needs a pipeline that draws noise, and upscales every image twice: the other terms are means "
        "over both",
    )
    energy_apart: _Share = Field(
        1.0,
        description="weight of what keeps the two draws apart; 1: the energy score; less: more faithful, and draws "
        "differ less",
    )
    perceptual_weight: _Weight = Field(
        0.0, description="of the distance of the reward perceptual, for who has no weights of VGG16"
    )
    vgg: str | None = Field(None, description="VGG16 weights for LPIPS; null: torchvision's")
    lpips: str | None = Field(None, description="LPIPS's own weights, of its authors' vgg.pth; null: from the Hub")
    vsd_times: tuple[_Share, _Share] = Field(
        (0.02, 0.5), description="distillation noises as of times in [first, last) of the schedule, as shares of it"
    )
    vsd_guidance: float = Field(7.5, ge=1, le=1000, description="classifier-free guidance of the frozen base")
    negative_prompt: str = Field(
        "blurry, noisy, jpeg artifacts, low resolution, over-smooth, watermark, painting, sketch, cartoon",
        description="what the frozen base is guided away from",
    )
    fake_rank: int = Field(4, ge=1, le=4096, description="of the second LoRA; its alpha is twice that")
    fake_learning_rate: float = Field(1.0, gt=0, le=1e6, description="of the second LoRA: times the recipe's")
    full: Literal["input", "denoiser", "all", "none"] = Field(
        "input",
        description="input: LoRA, and the first convolution of the denoiser in full, as published; none: LoRA alone; "
        "denoiser, all: no LoRA, but all weights of the denoiser, or of denoiser and encoder, which a base that "
        "starts random needs",
    )
    micro_batch: MicroBatch = Field(
        "auto",
        description="images in a pass with gradients, each with its two draws where energy_weight has some; auto: as "
        "many as fit the card, on a CPU all; null: the whole batch",
    )


@dataclass(frozen=True)
class Pairs:
    """What `prepare` leaves: images with their targets, for there is nothing to sample."""

    batch: Batch
    metrics: Mapping[str, Scalar]


class NAOSD(Method):
    """The method: `losses` upscales with gradients, encoder and decoder included, and compares with HQ.

    Under the energy score an image is encoded once and upscaled twice, with noise of its own each time.

    Raises:
        UserError: a pipeline of several steps or another kind of schedule, or one that draws no noise under the energy
            score; options that leave nothing to train on; or weights of LPIPS or `perceptual` that cannot be had.
    """

    Options = NAOSDOptions
    rewarded = False
    trains_encoders = True
    options: NAOSDOptions

    @classmethod
    def lora_targets(cls, adapter: ISRAdapter, options: NAOSDOptions) -> Mapping[str, Sequence[str]]:
        """Denoiser and encoder, unless all of their weights are trained."""
        return {} if options.full in ("denoiser", "all") else super().lora_targets(adapter, options)

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: NAOSDOptions
    ) -> None:
        super().__init__(adapter, rewards, weights, options)
        if not adapter.one_step or not isinstance(adapter.schedule, VP):
            raise UserError(
                f"naosd trains pipelines of one step of diffusion, and adapter '{adapter.name}' takes "
                f"{len(adapter.steps)} of {adapter.schedule}: use osediff"
            )
        weights_of = {name: getattr(options, name) for name in type(options).model_fields if name.endswith("_weight")}
        if not any(weights_of.values()):
            raise UserError(f"naosd has nothing to train on: {', '.join(weights_of)} are all 0")
        if options.energy_weight and adapter.deterministic:
            raise UserError(
                f"naosd: energy_weight compares two draws of an image, and adapter '{adapter.name}' is deterministic "
                "as configured: set its option noise_t (GDPO-SR: noise_t=250, net_t=100), or energy_weight=0"
            )
        first, last = (round(share * (adapter.schedule.last + 1)) for share in options.vsd_times)
        if options.vsd_weight and first >= last:
            raise UserError(f"naosd: vsd_times {list(options.vsd_times)} hold no time: give [first, last) of [0, 1]")
        self._times = first, last
        self._lpips = self._perceptual = None
        if options.lpips_weight:
            self._lpips = lpips.LPIPS(options.vgg, options.lpips, INSTEAD).to(adapter.device)
        if options.perceptual_weight:
            self._perceptual = perceptual.Perceptual(perceptual.PerceptualOptions())
        if options.vsd_weight:
            self._negative = _text(adapter, options.negative_prompt)
            if not lora.attached(adapter, FAKE):
                rank = options.fake_rank
                lora.attach(adapter, rank, 2 * rank, 1, name=FAKE, targets=adapter.lora_targets, active=False)
        # After the second LoRA, for the first one on a network freezes what is there.
        self._full = {
            name: value
            for place in _places(adapter, options.full)
            for name, value in lora.train_in_full(adapter, place).items()
        }

    def parameters(self) -> list[ParameterGroup]:
        """What upscales, clipped together, and the fake score."""
        (own,) = super().parameters()
        groups = [replace(own, parameters={**own.parameters, **self._full})]
        if self.options.vsd_weight:
            fake = lora.parameters(self.adapter, FAKE)
            groups.append(ParameterGroup(FAKE, fake, FAKE, learning_rate=self.options.fake_learning_rate))
        return groups

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images, height and width in pixels, that a term cannot take.

        Raises:
            UserError: they are too small.
        """
        for option, term, smallest in (
            ("lpips_weight", "LPIPS", lpips.SMALLEST),
            ("perceptual_weight", "the reward perceptual", perceptual.SMALLEST),
            ("energy_weight", "the energy score", ENERGY_SMALLEST),
        ):
            if getattr(self.options, option) and min(size) < smallest:
                raise UserError(f"naosd: {term} needs {smallest} pixels a side, not {min(size)}; or set {option}=0")

    def prepare(self, batch: Batch, draws: Source) -> Pairs:
        """The images.

        Raises:
            TrainingError: HQ images are missing.
        """
        if batch.hq is None:
            raise TrainingError("naosd needs HQ images")
        return Pairs(batch, {})

    def losses(self, group: Pairs, draws: Source) -> Iterator[Loss]:
        """The loss of `micro_batch` images at a time, and after each that of the fake score on what they became."""
        count = len(group.batch)
        for rows in parts(count, self.micro_batch):
            share = (rows.stop - rows.start) / count
            batch, source = (group.batch, draws) if share == 1 else (group.batch.rows(rows), draws.rows(rows))
            loss, z0, condition = self._upscaled(batch, source)
            if not self.options.vsd_weight:
                yield replace(loss, value=loss.value * share, weight=share)
                continue
            yield replace(loss, value=loss.value * share, weight=share / 2)
            fake = self._fake_loss(z0, condition, source)
            yield replace(fake, value=fake.value * share, weight=share / 2)

    def _upscaled(self, batch: Batch, draws: Source) -> tuple[Loss, Tensor, Condition]:
        """The loss on these images; the latents of `sr` and what they are conditioned on, without gradients."""
        adapter = self.adapter
        condition = adapter.encode(batch, generator=draws)
        if self.options.energy_weight:
            batch, condition = batch.repeat(2), condition.repeat(2)
        z_t = adapter.start(condition, draws)
        z0 = adapter.schedule.x0(z_t, adapter.predict(z_t, adapter.net_t, condition), adapter.net_t)
        sr = adapter.decode(z0, condition)
        given = replace(condition, latents=condition.latents.detach())
        terms = self._terms(sr, batch)
        if self.options.vsd_weight:
            terms["vsd"] = self.options.vsd_weight * self.distillation(z0, given, draws)
        total = torch.stack(list(terms.values())).sum()
        metrics: dict[str, Scalar] = {"loss": total.detach()}
        metrics |= {f"loss/{name}": term.detach() for name, term in terms.items()}
        return Loss(total, metrics), z0.detach(), given

    def _terms(self, sr: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms that compare `sr` with HQ; under the energy score the draws of an image are adjacent."""
        options, terms = self.options, dict[str, Tensor]()
        assert batch.hq is not None
        if options.mse_weight:
            terms["mse"] = options.mse_weight * 4 * F.mse_loss(sr, batch.hq)  # 4: of images in [-1, 1]
        if self._lpips is not None:
            terms["lpips"] = options.lpips_weight * self._lpips(sr, batch.hq).mean()
        if self._perceptual is not None:
            terms["perceptual"] = -options.perceptual_weight * self._perceptual(sr, batch).mean()
        if options.energy_weight:
            score = energy_loss(sr.unflatten(0, (-1, 2)), batch.hq[::2], options.energy_apart)
            terms["energy"] = options.energy_weight * score
        return terms

    def distillation(self, z0: Tensor, condition: Condition, draws: Source) -> Tensor:
        """The loss of variational score distillation on latents `z0` (B, C, h, w); scalar, gradients reach `z0`."""
        adapter, schedule = self.adapter, self.adapter.schedule
        t, noise = self._noised(z0, *self._times, draws)
        with torch.no_grad():
            z_t = schedule.add_noise(z0.detach(), noise, t)
            with lora.only(adapter, FAKE):
                fake = schedule.x0(z_t, adapter.predict(z_t, t, condition), t)
            with lora.only(adapter):
                real = schedule.x0(z_t, self._guided(z_t, t, condition), t)
        return vsd_loss(z0, real, fake)

    def _guided(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the frozen base predicts under classifier-free guidance; a guidance of 1 leaves the negative out."""
        adapter, guidance = self.adapter, self.options.vsd_guidance
        if guidance == 1:
            return adapter.predict(z_t, t, condition)
        negative = replace(
            condition, **{name: value.expand(len(z_t), *value.shape[1:]) for name, value in self._negative.items()}
        )
        both = adapter.predict(torch.cat([z_t, z_t]), torch.cat([t, t]), condition.beside(negative))
        wanted, unwanted = both.chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    def fake_error(self, z0: Tensor, condition: Condition, draws: Source) -> Tensor:
        """Mean squared error of the fake score's prediction on latents `z0` (B, C, h, w) as of any time; scalar."""
        adapter, schedule = self.adapter, self.adapter.schedule
        t, noise = self._noised(z0, 0, int(schedule.last) + 1, draws)
        prediction = adapter.predict(schedule.add_noise(z0, noise, t), t, condition)
        return F.mse_loss(prediction, schedule.target(z0, noise, t))

    def _fake_loss(self, z0: Tensor, condition: Condition, draws: Source) -> Loss:
        """The error of the fake score, as a value with its gradient.

        Back-propagated here, while the LoRA is on: checkpointed parts compute again on the way back.
        """
        parameters = list(lora.parameters(self.adapter, FAKE).values())
        with lora.only(self.adapter, FAKE):
            error = self.fake_error(z0, condition, draws)
            gradients = torch.autograd.grad(error, parameters)
        value = sum((p * slope).sum() for p, slope in zip(parameters, gradients, strict=True))
        assert isinstance(value, Tensor)
        return Loss(value, {"loss/fake": error.detach()})

    def _noised(self, z0: Tensor, first: int, last: int, draws: Source) -> tuple[Tensor, Tensor]:
        """A time in [first, last) for each row (B,), and noise like `z0`."""
        t = first + draw((len(z0), 1), draws, high=last - first, device=z0.device).flatten()
        return t, draw(z0.shape, draws, device=z0.device)


def _places(adapter: ISRAdapter, full: str) -> list[str]:
    """What is trained in full."""
    if full == "none":
        return []
    if full == "input":
        return [f"{component}.conv_in" for component in adapter.trainable]
    if full == "denoiser":
        return list(adapter.trainable)
    parts_of = {
        component: dict.fromkeys(name.partition(".")[0] for name in found)
        for component, found in adapter.encoder_targets.items()
    }
    return [*adapter.trainable, *(f"{component}.{part}" for component, found in parts_of.items() for part in found)]


@torch.no_grad()
def _text(adapter: ISRAdapter, prompt: str) -> dict[str, Any]:
    """What a condition has of a prompt, for one row; of an image there is nothing in it."""
    side = adapter.size_multiple
    gray = torch.full((1, 3, side, side), 0.5, device=adapter.device)
    condition = adapter.encode(Batch(lq=gray, prompts=(prompt,)))
    return {name: value for name in ("text", "pooled") if (value := getattr(condition, name)) is not None}
