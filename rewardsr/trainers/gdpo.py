"""GDPO: group direct preference optimisation for super-resolution (GDPO-SR, arXiv 2603.16769).

For each LQ image the reference policy (our LoRA off) makes a group of outputs; rewards rank them; the policy is moved
towards predicting the better ones and away from the worse. Not the method of the same letters in language-model
toolkits (group reward-decoupled normalisation).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewardsr import lora, schedule
from rewardsr.adapter import Batch, Condition, ISRAdapter
from rewardsr.draws import Replay, Source, draw
from rewardsr.errors import TrainingError, UserError
from rewardsr.options import Options
from rewardsr.rewards.attribute import texture_share
from rewardsr.rewards.base import Reward
from rewardsr.trainers.base import Loss

logger = logging.getLogger(__name__)

STD_FLOOR = 1e-8  # the paper's
TIE = 1e-6  # combined rewards lie in [0, 1]: a spread below this is rounding, and normalising it would make noise of it
FLAT = 1e-3  # a quarter of an 8-bit level: a group that differs by less has nothing to choose from


class GDPOOptions(Options):
    """Options of GDPO; the defaults are the paper's."""

    group_size: int = Field(6, ge=2, description="outputs per LQ image (G)")
    beta: float = Field(5000.0, gt=0, description="strength of the preference; large values saturate sooner")
    preference: Literal["paper", "conditional"] = Field(
        "paper",
        description="of one-step pipelines; paper: noise the re-encoded outputs; conditional: noise the LQ latents, as "
        "at inference. With several steps there is one form: noise the outputs' own latents",
    )
    sampling_steps: int | None = Field(
        None, ge=1, description="steps that a group is sampled with; None: all of the pipeline's"
    )
    shared_noise: bool = Field(False, description="conditional: one noise for a group, so one policy pass serves it")
    weighting: Literal["fixed", "attribute"] = Field(
        "fixed", description="fixed: the rewards' weights; attribute: shared by the texture share of HQ"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="rows in a network pass; None: the whole batch of groups at once"
    )
    shuffle_advantages: bool = Field(False, description="control run: rewards are dealt out at random in each group")


@dataclass(frozen=True)
class Group:
    """What `prepare` leaves for the losses; B images, G outputs each, all without gradients.

    Attributes:
        condition: of the B images.
        latents: (B*G, C, h, w) of the outputs, as the reference denoised them; `paper` with one step: re-encoded.
        advantages: (B, G).
        metrics: what to log of the sampling.
    """

    condition: Condition
    latents: Tensor
    advantages: Tensor
    metrics: dict[str, float]


def group_advantages(scores: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Advantages of the members of each group.

    Each metric is min-max normalised inside the group, r = sum of weight * metric, A = (r - mean) / (std + 1e-8)
    with the unbiased std.
    A metric that is constant in a group contributes 0 there; a fully tied group and a group of one get zero advantages.

    Args:
        scores: per metric (B, G), higher is better.
        weights: per metric (B,).

    Returns:
        (B, G) float32.

    Raises:
        TrainingError: a score is not finite; the metric is named.
    """
    total: Tensor | None = None
    for name, values in scores.items():
        if not values.isfinite().all():
            raise TrainingError(f"reward '{name}' gave a score that is not finite")
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        spread = high - low
        normalised = torch.where(spread > 0, (values - low) / spread.where(spread > 0, 1.0), 0.0)
        weighted = weights[name].to(values).unsqueeze(1) * normalised
        total = weighted if total is None else total + weighted
    if total is None:
        raise ValueError("group_advantages: no scores")
    if total.shape[1] < 2:
        return torch.zeros_like(total)
    std = total.std(1, keepdim=True)
    return torch.where(std > TIE, (total - total.mean(1, keepdim=True)) / (std + STD_FLOOR), 0.0)


def preference_logit(policy_error: Tensor, reference_error: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """s (B,) = -beta/2 * sum_g A_g (L_g - L_g^ref), of (B, G) errors and advantages."""
    return -beta / 2 * (advantages * (policy_error - reference_error)).sum(1)


def gdpo_loss(policy_error: Tensor, reference_error: Tensor, advantages: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The GDPO loss: -logsigmoid(s), mean over the batch.

    Args:
        policy_error: (B, G) mean squared errors of the policy's predictions.
        reference_error: (B, G) of the reference's, on the same inputs.
        advantages: (B, G).
        beta: strength of the preference.

    Returns:
        The loss and the implicit accuracy (share of s > 0), both scalars.
    """
    s = preference_logit(policy_error, reference_error, advantages, beta)
    return -F.logsigmoid(s).mean(), (s > 0).float().mean().detach()


class GDPO:
    """The method: `prepare` samples and scores groups, `losses` compares policy and reference on them.

    Args:
        adapter: the pipeline, with our LoRA attached.
        rewards: what outputs are scored by, by name.
        weights: weight of each reward.
        options: of the method.

    Raises:
        UserError: a pipeline that has no group (deterministic), or options or weights that cannot work.
    """

    Options = GDPOOptions
    differentiates = False

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: GDPOOptions
    ) -> None:
        if adapter.deterministic:
            raise UserError(
                f"adapter '{adapter.name}' is deterministic as configured, so the outputs of a group would be equal: "
                "set its option noise_t (GDPO-SR: noise_t=250, net_t=100)"
            )
        if options.preference == "conditional" and not adapter.one_step:
            raise UserError(
                f"gdpo: preference 'conditional' is for one-step pipelines; adapter '{adapter.name}' takes "
                f"{len(adapter.steps)} steps: leave it out"
            )
        if options.shared_noise and options.preference == "paper":
            raise UserError("gdpo: shared_noise belongs to preference 'conditional'")
        if not rewards or sum(weights.values()) <= 0:
            raise UserError("gdpo needs at least one reward with a positive weight")
        if options.weighting == "attribute" and {reward.kind for reward in rewards.values()} != {"fidelity", "detail"}:
            raise UserError("weighting 'attribute' needs rewards of both kinds: fidelity (psnr) and detail (musiq)")
        self.adapter, self.rewards, self.weights, self.options = adapter, rewards, weights, options
        self._warned = False

    @torch.no_grad()
    def prepare(self, batch: Batch, draws: Source) -> Group:
        """Sample a group of outputs for each image under the reference policy, and score them.

        Raises:
            TrainingError: a reward gave a score that is not finite.
        """
        group, adapter = self.options.group_size, self.adapter
        with lora.reference(adapter):
            condition = adapter.encode(batch, generator=draws)
            members = condition.repeat(group)
            steps = schedule.fewer(adapter.steps, self.options.sampling_steps or len(adapter.steps))
            latents = adapter.sample_latents(members, draws, steps, rows=self.options.micro_batch)
            sr = self._chunked(lambda rows: adapter.decode(latents[rows], members.rows(rows)), len(latents))
            scores = self._score(sr, batch.repeat(group))
            advantages = group_advantages(scores, self._reward_weights(batch))
            if self.options.shuffle_advantages:
                advantages = advantages.gather(1, draw(advantages.shape, draws, device=advantages.device).argsort(1))
            if self.options.preference == "paper" and adapter.one_step:
                # The original draws a fresh posterior sample of every output, and so does this.
                latents = self._encode_outputs(sr, latents, draws)
        metrics = {f"reference/{name}": float(values.mean()) for name, values in scores.items()}
        metrics |= {f"spread/{name}": float(values.std(1).mean()) for name, values in scores.items()}
        metrics["group/pixel_std"] = float(sr.unflatten(0, (-1, group)).std(1).mean())
        metrics["group/tied"] = float((advantages == 0).all(1).float().mean())
        if metrics["group/pixel_std"] < FLAT and not self._warned:
            self._warned = True
            logger.warning(
                "the outputs of a group hardly differ (pixel std %.1e): there is little to choose from",
                metrics["group/pixel_std"],
            )
        return Group(condition, latents, advantages, metrics)

    def losses(self, group: Group, draws: Source) -> Iterator[Loss]:
        """The loss of a group, in as few passes as `micro_batch` allows; each is to be back-propagated at once."""
        size, images = self.options.group_size, len(group.condition)
        task = self._task(group, draws)
        rows = self.options.micro_batch or len(group.latents)
        if not self.options.shared_noise and rows < size:
            for image in range(images):
                yield self._accumulated(task, group.advantages, image, rows)
            return
        per_pass = rows if self.options.shared_noise else rows // size
        for start in range(0, images, per_pass):
            yield self._at_once(task, group.advantages, start, min(start + per_pass, images))

    # ---- sampling ----

    def _score(self, sr: Tensor, batch: Batch) -> dict[str, Tensor]:
        size = self.options.group_size
        return {name: reward(sr, batch).float().unflatten(0, (-1, size)) for name, reward in self.rewards.items()}

    def _reward_weights(self, batch: Batch) -> dict[str, Tensor]:
        """(B,) weight of each reward: as configured, or shared out by the texture share of HQ between the two kinds."""
        ones = torch.ones(len(batch), device=self.adapter.device)
        if self.options.weighting == "fixed":
            return {name: ones * self.weights[name] for name in self.rewards}
        if batch.hq is None:
            raise TrainingError("weighting 'attribute' needs HQ images")
        texture = texture_share(batch.hq)
        share = {"detail": texture, "fidelity": 1 - texture}
        totals = {
            kind: sum(self.weights[name] for name, reward in self.rewards.items() if reward.kind == kind)
            for kind in share
        }
        return {name: share[r.kind] * self.weights[name] / totals[r.kind] for name, r in self.rewards.items()}

    def _encode_outputs(self, sr: Tensor, like: Tensor, draws: Source) -> Tensor:
        """Latents of the outputs, each a fresh posterior sample as in the original."""
        noise = draw(like.shape, draws)
        return self._chunked(lambda rows: self.adapter.to_latents(sr[rows], Replay([noise[rows]])), len(sr))

    def _chunked(self, function: Callable[[slice], Tensor], rows: int) -> Tensor:
        step = self.options.micro_batch or rows
        return torch.cat([function(slice(start, min(start + step, rows))) for start in range(0, rows, step)])

    # ---- preference ----

    def _task(self, group: Group, draws: Source) -> "_Task":
        """What policy and reference are compared on: noisy latents, and the right prediction for each output."""
        adapter, size = self.adapter, self.options.group_size
        condition = group.condition if self.options.shared_noise else group.condition.repeat(size)
        if not adapter.one_step:
            return self._diffusion_task(group, condition, draws)
        if self.options.preference == "paper":
            noise = draw(group.latents.shape, draws, device=group.latents.device)
            noise_t = adapter.net_t if adapter.noise_t is None else adapter.noise_t
            z_t = schedule.add_noise(group.latents, noise, noise_t, adapter.alphas_cumprod)
            return _Task(condition, z_t, self._net_t(len(z_t)), noise)
        # The start of inference with fresh noise: with that of the sampling, the target would be what the reference
        # predicts already, and nothing would train.
        z_t = adapter.start(condition, draws)
        each = z_t.repeat_interleave(size, 0) if self.options.shared_noise else z_t
        target = schedule.eps_from_x0(each, group.latents, adapter.net_t, adapter.alphas_cumprod)
        return _Task(condition, z_t, self._net_t(len(z_t)), target)

    def _diffusion_task(self, group: Group, members: Condition, draws: Source) -> "_Task":
        """Several steps: the outputs' latents are noised as of one time of the schedule, one noise and time a group.

        As in Diffusion-DPO (arXiv 2311.12908): what conditions the network is not what is noised, so the target is the
        noise itself, and one form does for training and inference.
        """
        adapter, size, images = self.adapter, self.options.group_size, len(group.condition)
        place = draw((images, 1), draws, high=len(adapter.steps)).flatten()
        noise = draw((images, *group.latents.shape[1:]), draws, device=group.latents.device).repeat_interleave(size, 0)
        t = torch.tensor(adapter.steps)[place].to(noise.device).repeat_interleave(size, 0)
        return _Task(members, schedule.add_noise(group.latents, noise, t, adapter.alphas_cumprod), t, noise)

    def _net_t(self, rows: int) -> Tensor:
        return torch.full((rows,), self.adapter.net_t, device=self.adapter.device)

    def _errors(self, task: "_Task", first: int, last: int) -> Tensor:
        """Mean squared error (C, H, W) of the predictions in rows first .. last-1, one value an output, flat."""
        rows = slice(first, last)
        eps = self.adapter.predict_eps(task.z_t[rows], task.t[rows], task.condition.rows(rows))
        if self.options.shared_noise:
            size = self.options.group_size
            eps, first, last = eps.repeat_interleave(size, 0), first * size, last * size
        return (eps - task.target[first:last]).square().mean((1, 2, 3))

    def _reference_errors(self, task: "_Task", first: int, last: int) -> Tensor:
        with torch.no_grad(), lora.reference(self.adapter):
            return self._errors(task, first, last)

    def _at_once(self, task: "_Task", advantages: Tensor, start: int, stop: int) -> Loss:
        """The loss of images start .. stop-1, whose groups fit one pass."""
        size = 1 if self.options.shared_noise else self.options.group_size
        advantages = advantages[start:stop]
        reference = self._reference_errors(task, start * size, stop * size).reshape(advantages.shape)
        policy = self._errors(task, start * size, stop * size).reshape(advantages.shape)
        loss, accuracy = gdpo_loss(policy, reference, advantages, self.options.beta)
        weight = len(advantages) / len(task.condition) * size
        return Loss(loss * weight, {"loss": float(loss.detach()), "implicit_accuracy": float(accuracy)}, weight)

    def _accumulated(self, task: "_Task", advantages: Tensor, image: int, rows: int) -> Loss:
        """The loss of one image whose group does not fit one pass: exact, and no second pass.

        The gradient of -logsigmoid(s) is -(1 - sigmoid(s)) ds: ds is accumulated chunk by chunk, and scaled at the end
        when s is known.
        """
        size, parameters = self.options.group_size, list(lora.parameters(self.adapter).values())
        total = torch.zeros((), device=task.z_t.device)
        gradient = [torch.zeros_like(parameter) for parameter in parameters]
        for first in range(0, size, rows):
            last = min(first + rows, size)
            chunk, offset = advantages[image : image + 1, first:last], image * size
            reference = self._reference_errors(task, offset + first, offset + last)
            policy = self._errors(task, offset + first, offset + last)
            part = preference_logit(policy[None], reference[None], chunk, self.options.beta).sum()
            for whole, partial in zip(gradient, torch.autograd.grad(part, parameters), strict=True):
                whole += partial
            total += part.detach()
        weight = size / len(task.condition)
        factor = -torch.sigmoid(-total) * weight
        value = torch.stack([(p * g).sum() for p, g in zip(parameters, gradient, strict=True)]).sum() * factor
        return Loss(value, {"loss": float(-F.logsigmoid(total)), "implicit_accuracy": float(total > 0)}, weight)


@dataclass(frozen=True)
class _Task:
    """Rows of a preference loss: condition, noisy latents (R, C, h, w), times (R,), and a target per output."""

    condition: Condition
    z_t: Tensor
    t: Tensor
    target: Tensor
