"""GDPO: group direct preference optimisation for super-resolution (GDPO-SR, arXiv 2603.16769).

For each LQ image the reference policy (our LoRA off) makes a group of outputs; rewards rank them; the policy is moved
towards predicting the better ones and away from the worse. Not the method of the same letters in language-model
toolkits (group reward-decoupled normalisation).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Source
from rewardsr.rewards.base import Reward
from rewardsr.trainers.base import Loss, Method
from rewardsr.trainers.groups import Group, GroupOptions, Groups, Task, by_group
from rewardsr.trainers.preferences import gdpo_loss, preference_logit


class GDPOOptions(GroupOptions):
    """Options of GDPO; the defaults are the paper's."""

    beta: float = Field(5000.0, gt=0, le=1e9, description="strength of the preference; large values saturate sooner")


class GDPO(Method):
    """The method: `prepare` samples and scores groups, `losses` compares policy and reference on them.

    Raises:
        UserError: a pipeline that has no group (deterministic), or options or weights that cannot work.
    """

    Options = GDPOOptions
    options: GDPOOptions

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: GDPOOptions
    ) -> None:
        super().__init__(adapter, rewards, weights, options)
        self.groups = Groups(self, "gdpo")
        self._parameters = [p for group in self.trained for p in group.parameters.values()]

    @classmethod
    def needs_hq(cls, options: GDPOOptions) -> str | None:
        """The texture share, where rewards are weighted by it."""
        return "weighting 'attribute' (trainer_options.weighting)" if options.weighting == "attribute" else None

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse images that tiles do not fill; see `Groups.check_size`."""
        self.groups.check_size(size)

    def prepare(self, batch: Batch, draws: Source) -> Group:
        """Sample a group of outputs for each image under the reference policy, and score them."""
        return self.groups.sample(batch, draws)

    def losses(self, group: Group, draws: Source) -> Iterator[Loss]:
        """The loss of a group, in as few passes as `micro_batch` allows; each is to be back-propagated at once."""
        task, images = self.groups.task(group, draws), len(group.condition)
        advantages = group.advantages.unflatten(0, (images, -1))
        each = self.rows_per_image
        rows = self.micro_batch or images * each
        if rows < each:
            for image in range(images):
                yield self._accumulated(task, advantages[image], image)
            return
        for start in range(0, images, rows // each):
            yield self._at_once(task, advantages[start : start + rows // each], start)

    def _at_once(self, task: Task, advantages: Tensor, first: int) -> Loss:
        """The loss of images whose groups fit one pass: those from `first` on, with advantages (N, P, G) of P tiles."""
        each, (images, tiles, members) = self.rows_per_image, advantages.shape
        rows = slice(first * each, (first + images) * each)
        reference = by_group(self.groups.reference_errors(task, rows), members, tiles)
        policy = by_group(self.groups.errors(task, rows), members, tiles)
        loss, accuracy = gdpo_loss(policy, reference, advantages.flatten(0, 1), self.options.beta)
        weight = images * each / len(task.condition)
        return Loss(loss * weight, {"loss": loss.detach(), "implicit_accuracy": accuracy}, weight)

    def _accumulated(self, task: Task, advantages: Tensor, image: int) -> Loss:
        """The loss of one image whose group does not fit one pass, of advantages (P, G): exact, chunk by chunk.

        The gradient of -logsigmoid(s) is -(1 - sigmoid(s)) ds. A single ds is accumulated, and scaled at the end when s
        is known. Those of several tiles are scaled each by its own s, which takes a pass to find out before.
        """
        first = image * self.groups.size
        chunks = [
            (rows, advantages[:, rows.start - first : rows.stop - first])
            for rows in self.groups.chunks(first, first + self.groups.size)
        ]
        alone = len(advantages) == 1
        known = torch.zeros(len(advantages), device=task.z_t.device)
        for chunk in [] if alone else chunks:
            known += self._logits(task, *chunk).detach()
        total = torch.zeros_like(known)
        gradient = [torch.zeros_like(parameter) for parameter in self._parameters]
        for chunk in chunks:
            part = self._logits(task, *chunk)
            total += part.detach()
            scaled = part if alone else part * -torch.sigmoid(-known)
            torch._foreach_add_(gradient, torch.autograd.grad(scaled.mean(), self._parameters))
        weight = self.groups.size / len(task.condition)
        factor = weight * -torch.sigmoid(-total[0]) if alone else weight
        pairs = zip(self._parameters, gradient, strict=True)
        value = torch.stack([(parameter * whole).sum() for parameter, whole in pairs]).sum() * factor
        accuracy = (total > 0).float().mean()
        return Loss(value, {"loss": -F.logsigmoid(total).mean(), "implicit_accuracy": accuracy}, weight)

    def _logits(self, task: Task, rows: slice, advantages: Tensor) -> Tensor:
        """What these rows, some members of one group, add to the s (P,) of its tiles; advantages (P, members)."""
        tiles, members = advantages.shape
        reference = by_group(self.groups.reference_errors(task, rows), members, tiles)
        policy = by_group(self.groups.errors(task, rows), members, tiles)
        return preference_logit(policy, reference, advantages, self.options.beta)
