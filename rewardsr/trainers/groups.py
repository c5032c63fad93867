"""Groups of outputs, for all methods that learn from comparing them: sampled, scored and predicted on, in chunks.

A method asks for a `Group` in its `prepare`, and in its `losses` for a `Task`: noisy latents, and the prediction that
would have given each output. Policy and reference are compared on the same task, along the same numeric path.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewardsr.batch import Batch, Condition, parts
from rewardsr.checks import remark
from rewardsr.draws import Replay, Source, draw
from rewardsr.errors import TrainingError, UserError
from rewardsr.options import Options
from rewardsr.rewards.attribute import texture_share
from rewardsr.rewards.base import Reward
from rewardsr.schedule import fewer
from rewardsr.trainers.base import Method, MicroBatch, Scalar
from rewardsr.trainers.preferences import group_advantages
from rewardsr.transfer import to_device

logger = logging.getLogger(__name__)

# Of a pass of the autoencoder without gradients. Norms of a single image keep few of a card's processors busy (six of
# 512 px, decoded one by one, took an H100 0.17 s: four times what operations and traffic need), and many take memory.
PASS_PIXELS = 6 * 512 * 512
REWARD_IMAGES, REWARD_PIXELS = 4, 2**19  # that a reward sees at once: 9 GB with MANIQA, 4.6 GB at 512x512
FLAT = 1e-3  # a quarter of an 8-bit level: a group that differs by less has nothing to choose from


class GroupOptions(Options):
    """Options of every method that learns from groups."""

    group_size: int = Field(6, ge=2, le=1024, description="outputs per LQ image (G)")
    preference: Literal["paper", "conditional"] = Field(
        "paper",
        description="of one-step pipelines; paper: noise the re-encoded outputs; conditional: noise the LQ latents, as "
        "at inference. With several steps there is one form: noise the outputs' own latents",
    )
    sampling_steps: int | None = Field(
        None, ge=1, le=10_000, description="steps that a group is sampled with; null: all of the pipeline's"
    )
    shared_noise: bool = Field(False, description="conditional: one noise for a group, so one policy pass serves it")
    reward_tile: int | None = Field(
        None,
        ge=8,
        le=10**5,
        description="rewards judge tiles of so many pixels a side, and each tile is a group of its own: many more "
        "comparisons from the same outputs, for rewards that say something of a tile (psnr); null: whole images",
    )
    weighting: Literal["fixed", "attribute"] = Field(
        "fixed", description="fixed: the rewards' weights; attribute: shared by the texture share of HQ"
    )
    micro_batch: MicroBatch = Field(
        "auto",
        description="rows in a network pass; auto: as many as fit the card, on a CPU all; null: the whole batch of "
        "groups at once",
    )
    reward_batch: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="images that a reward sees at once; null: at most 4 and 2^19 pixels (two of 512x512), and no more "
        "than micro_batch",
    )
    shuffle_advantages: bool = Field(False, description="control run: rewards are dealt out at random in each group")


@dataclass(frozen=True)
class Group:
    """What sampling leaves for the losses; B images, G outputs each, all without gradients.

    Attributes:
        condition: of the B images.
        latents: (B*G, C, h, w) of the outputs, as the reference denoised them; `paper` with one step: re-encoded.
        advantages: (B, G); with `reward_tile` (B * P, G), a row a tile, the P tiles of an image adjacent.
        metrics: what to log of the sampling.
    """

    condition: Condition
    latents: Tensor
    advantages: Tensor
    metrics: dict[str, Scalar]


@dataclass(frozen=True)
class Task:
    """What policy and reference are asked: R rows, of which each stands for one output, or for all of a group.

    Attributes:
        condition: of the R rows.
        z_t: (R, C, h, w) noisy latents.
        t: (R,) times.
        target: (B*G, C, h, w), the prediction that would have given each output.
    """

    condition: Condition
    z_t: Tensor
    t: Tensor
    target: Tensor


class Groups:
    """Makes groups, and the tasks that policy and reference are compared on.

    Args:
        method: whose pipeline, rewards and options they are made with; its `reference` is the policy that samples, and
            that the trained one is compared with.
        name: of the method, for messages.

    Raises:
        UserError: a pipeline that has no group (deterministic), or options or weights that cannot work.
    """

    def __init__(self, method: Method, name: str) -> None:
        adapter, rewards, weights = method.adapter, method.rewards, method.weights
        options: GroupOptions = method.options
        if adapter.deterministic:
            raise UserError(
                f"adapter '{adapter.name}' is deterministic as configured, so the outputs of a group would be equal: "
                "set its option noise_t (GDPO-SR: noise_t=250, net_t=100)"
            )
        if options.preference == "conditional" and not adapter.one_step:
            raise UserError(
                f"{name}: preference 'conditional' is for one-step pipelines; adapter '{adapter.name}' takes "
                f"{len(adapter.steps)} steps: leave it out"
            )
        if options.shared_noise and options.preference == "paper":
            raise UserError(f"{name}: shared_noise belongs to preference 'conditional'")
        if not rewards or sum(weights.values()) <= 0:
            raise UserError(f"{name} needs at least one reward with a positive weight")
        if options.weighting == "attribute" and {reward.kind for reward in rewards.values()} != {"fidelity", "detail"}:
            raise UserError("weighting 'attribute' needs rewards of both kinds: fidelity (psnr) and detail (musiq)")
        unit = math.lcm(adapter.compression, adapter.scale)
        if options.reward_tile is not None and options.reward_tile % unit:
            raise UserError(f"{name}: reward_tile is {options.reward_tile}, expected a multiple of {unit} pixels here")
        self.adapter, self.rewards, self.weights, self.options = adapter, rewards, weights, options
        self.reference = method.reference
        self.size = options.group_size
        # Rows of a task: one for each output, or for each group where one noise serves it.
        self.rows_per_image = method.rows_per_image = 1 if options.shared_noise else self.size
        self._method = method
        self._warned = False

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images, height and width in pixels, that tiles do not fill.

        Raises:
            UserError: they are no multiple of `reward_tile`.
        """
        tile = self.options.reward_tile
        if tile is not None and any(side % tile for side in size):
            raise UserError(f"tiles of {tile} pixels (reward_tile) do not fill images of {size[1]}x{size[0]}")

    # ---- sampling and scoring ----

    @torch.no_grad()
    def sample(self, batch: Batch, draws: Source) -> Group:
        """Sample a group of outputs for each image under the reference policy, and score them.

        Raises:
            TrainingError: a reward gave a score that is not finite.
        """
        adapter = self.adapter
        with self.reference():
            condition = adapter.encode(batch, generator=draws)
            members = condition.repeat(self.size)
            steps = fewer(adapter.steps, self.options.sampling_steps or len(adapter.steps))
            latents = adapter.sample_latents(members, draws, steps, rows=self._method.micro_batch)
            sr = self._by_pixels(lambda rows: adapter.decode(latents[rows], members.rows(rows)), members)
            scores = self._score(sr, batch.repeat(self.size))
            advantages = group_advantages(scores, self._reward_weights(self._judged(batch)))
            if self.options.preference == "paper" and adapter.one_step:
                # The original draws a fresh posterior sample of every output, and so does this.
                noise = draw(latents.shape, draws)
                latents = self._by_pixels(lambda rows: adapter.to_latents(sr[rows], Replay([noise[rows]])), members)
        if self.options.shuffle_advantages:  # drawn last, so that the control is the same run otherwise
            advantages = advantages.gather(1, draw(advantages.shape, draws, device=advantages.device).argsort(1))
        return Group(condition, latents, advantages, self._metrics(sr, scores, advantages))

    def _score(self, sr: Tensor, batch: Batch) -> dict[str, Tensor]:
        """(B, G) scores by reward; of tiles (B * P, G)."""
        judged, outputs = (
            self._judged(batch),
            sr if self.options.reward_tile is None else _tiles(sr, self.options.reward_tile),
        )
        scores = {name: self._scored(reward, outputs, judged) for name, reward in self.rewards.items()}
        return {name: by_group(values, self.size, len(outputs) // len(sr)) for name, values in scores.items()}

    def _judged(self, batch: Batch) -> Batch:
        """What rewards see of these images: all, or their tiles, those of an image adjacent."""
        side = self.options.reward_tile
        if side is None:
            return batch
        lq = _tiles(batch.lq, side // self.adapter.scale)
        tiled = batch.repeat(len(lq) // len(batch))
        return replace(tiled, lq=lq, hq=None if batch.hq is None else _tiles(batch.hq, side))

    def _scored(self, reward: Reward, sr: Tensor, batch: Batch) -> Tensor:
        """(B*G,) scores, `reward_batch` images at a time: a network may take gigabytes an image (MANIQA: 2.3).

        What a reward draws it draws alike for every part, so that the members of a group are judged alike.
        """
        most = self.options.reward_batch or max(1, min(REWARD_IMAGES, REWARD_PIXELS // sr[0, 0].numel()))
        if self.options.reward_batch is None:
            most = min(most, self._method.micro_batch or most)
        cards = [sr.device] if sr.is_cuda and torch.cuda.is_initialized() else []
        scores = []
        for rows in parts(len(sr), None if getattr(reward, "light", False) else most):
            with torch.random.fork_rng(cards, enabled=rows.stop < len(sr)):
                scores.append(reward(sr[rows], batch.rows(rows)).float())
        return torch.cat(scores)

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

    def _metrics(self, sr: Tensor, scores: dict[str, Tensor], advantages: Tensor) -> dict[str, Scalar]:
        metrics: dict[str, Scalar] = {f"reference/{name}": values.mean() for name, values in scores.items()}
        metrics |= {f"spread/{name}": values.std(1).mean() for name, values in scores.items()}
        spread = sr.unflatten(0, (-1, self.size)).std(1).mean()
        remark(spread >= FLAT, lambda: self._warn_of_flat(spread))
        return metrics | {"group/pixel_std": spread, "group/tied": (advantages == 0).all(1).float().mean()}

    def _warn_of_flat(self, spread: Tensor) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the outputs of a group hardly differ (pixel std %.1e): there is little to choose from", float(spread)
            )

    def _by_pixels(self, function: Callable[[slice], Tensor], members: Condition) -> Tensor:
        """Passes of the autoencoder, as many images at once as make `PASS_PIXELS`."""
        fitting = max(1, PASS_PIXELS // (members.size[0] * members.size[1]))
        most = min(fitting, self._method.micro_batch or fitting)
        return torch.cat([function(rows) for rows in parts(len(members), most)])

    def chunks(self, first: int, last: int) -> Iterator[slice]:
        """Rows first .. last-1, at most `micro_batch` at a time."""
        step = self._method.micro_batch or last - first
        return (slice(start, min(start + step, last)) for start in range(first, last, step))

    # ---- tasks ----

    def task(self, group: Group, draws: Source) -> Task:
        """What to compare policy and reference on, with fresh noise."""
        adapter = self.adapter
        condition = group.condition.repeat(self.rows_per_image)
        if not adapter.one_step:
            return self._diffusion_task(group, condition, draws)
        t = torch.full((len(condition),), adapter.net_t, dtype=adapter.schedule.dtype, device=adapter.device)
        if self.options.preference == "paper":
            noise = draw(group.latents.shape, draws, device=group.latents.device)
            noise_t = adapter.net_t if adapter.noise_t is None else adapter.noise_t
            z_t = adapter.schedule.add_noise(group.latents, noise, noise_t)
            return Task(condition, z_t, t, adapter.schedule.target(group.latents, noise, adapter.net_t))
        # The start of inference with fresh noise: with that of the sampling, the target would be what the reference
        # predicts already, and nothing would train.
        z_t = adapter.start(condition, draws)
        each = z_t.repeat_interleave(self.size // self.rows_per_image, 0)
        return Task(condition, z_t, t, adapter.schedule.target_from(each, group.latents, adapter.net_t))

    def _diffusion_task(self, group: Group, members: Condition, draws: Source) -> Task:
        """Several steps: the outputs' latents are noised as of one time of the schedule, one noise and time a group.

        As in Diffusion-DPO (arXiv 2311.12908): what conditions the network is not what is noised, so the target is that
        of the noise itself, and one form does for training and inference.
        """
        adapter, images = self.adapter, len(group.condition)
        place = draw((images, 1), draws, high=len(adapter.steps)).flatten()
        noise = draw((images, *group.latents.shape[1:]), draws, device=group.latents.device)
        noise = noise.repeat_interleave(self.size, 0)
        times = adapter.schedule.times(adapter.steps)[place]
        t = to_device(times, noise.device).repeat_interleave(self.size, 0)
        z_t = adapter.schedule.add_noise(group.latents, noise, t)
        return Task(members, z_t, t, adapter.schedule.target(group.latents, noise, t))

    def errors(self, task: Task, rows: slice) -> Tensor:
        """Mean squared error (over C, H, W) of the predictions in these rows, (N,): one value an output.

        With `reward_tile` (N * P,): one of each tile, those of an output adjacent.
        """
        return self.errors_of(self.predictions(task, rows), task, rows)

    def errors_of(self, prediction: Tensor, task: Task, rows: slice) -> Tensor:
        """`errors` of a prediction (R, C, h, w) that is there already."""
        each = self.size // self.rows_per_image
        target = task.target[rows.start * each : rows.stop * each]
        squares = (prediction.repeat_interleave(each, 0) - target).square()
        if self.options.reward_tile is None:
            return squares.mean((1, 2, 3))
        return F.avg_pool2d(squares.mean(1), self.options.reward_tile // self.adapter.compression).flatten()

    def reference_errors(self, task: Task, rows: slice) -> Tensor:
        """`errors` of the reference; to be asked before those of the policy, whose graph would be held meanwhile."""
        return self.errors_of(self.reference_predictions(task, rows), task, rows)

    def predictions(self, task: Task, rows: slice) -> Tensor:
        """What the policy predicts for these rows, (R, C, h, w)."""
        return self.adapter.predict(task.z_t[rows], task.t[rows], task.condition.rows(rows))

    def reference_predictions(self, task: Task, rows: slice) -> Tensor:
        """`predictions` of the reference; to be asked before those of the policy."""
        # Not under no_grad: there a compiled network would be another graph than the policy's, with other rounding.
        # Without its LoRA no other network keeps anything for gradients.
        with self.reference():
            return self.predictions(task, rows).detach()


def by_group(values: Tensor, members: int, tiles: int) -> Tensor:
    """(N * P, G) of values (N * G * P,), one a tile of an output: a row a group, those of an image adjacent."""
    return values.unflatten(0, (-1, members, tiles)).movedim(2, 1).flatten(0, 1)


def _tiles(images: Tensor, side: int) -> Tensor:
    """(N * P, C, side, side) of (N, C, H, W): the P tiles of an image adjacent, by rows."""
    cut = images.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # (N, C, rows, side, columns, side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
