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
from rewardsr.trainers.base import Loss, Method, Scalar
from rewardsr.trainers.groups import Group, GroupOptions, Groups, Task, by_group
from rewardsr.trainers.preferences import gdpo_loss, preference_logit


class GDPOOptions(GroupOptions):
    """Options of GDPO; the defaults are the paper's."""

    beta: float = Field(5000.0, gt=0, le=1e9, description="strength of the preference; large values saturate sooner")
    anchor: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the mean squared distance between the predictions of policy and reference: it holds "
        "what a group's outputs do not differ in, which preferences leave free",
    )


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
        each, images = self.rows_per_image, len(advantages)
        logits, distance = self._compared(task, slice(first * each, (first + images) * each), advantages)
        loss, accuracy = gdpo_loss(logits)
        weight = images * each / len(task.condition)
        return Loss((loss + self.options.anchor * distance) * weight, _metrics(loss, accuracy, distance), weight)

    def _accumulated(self, task: Task, advantages: Tensor, image: int) -> Loss:
        """The loss of one image whose group does not fit one pass, of advantages (P, G): exact, chunk by chunk.

        The gradient of -logsigmoid(s) is -(1 - sigmoid(s)) ds. A single ds is accumulated, and scaled at the end when s
        is known. Those of several tiles, and one beside an anchor, are scaled by their s, which takes a pass before.
        """
        first = image * self.groups.size
        chunks = [
            (rows, advantages[None, :, rows.start - first : rows.stop - first])
            for rows in self.groups.chunks(first, first + self.groups.size)
        ]
        at_end = len(advantages) == 1 and not self.options.anchor
        known = torch.zeros(len(advantages), device=task.z_t.device)
        for chunk in [] if at_end else chunks:
            known += self._compared(task, *chunk)[0].detach()
        total, distance = torch.zeros_like(known), torch.zeros((), device=known.device)
        gradient = [torch.zeros_like(parameter) for parameter in self._parameters]
        for chunk in chunks:
            part, apart = self._compared(task, *chunk)
            share = (chunk[0].stop - chunk[0].start) / self.groups.size
            value = (
                part.sum() if at_end else (part * -torch.sigmoid(-known)).mean() + self.options.anchor * share * apart
            )
            torch._foreach_add_(gradient, torch.autograd.grad(value, self._parameters))
            total += part.detach()
            distance += share * apart.detach()
        weight = self.groups.size / len(task.condition)
        factor = weight * (-torch.sigmoid(-total[0]) if at_end else 1.0)
        pairs = zip(self._parameters, gradient, strict=True)
        value = torch.stack([(parameter * whole).sum() for parameter, whole in pairs]).sum() * factor
        return Loss(value, _metrics(*gdpo_loss(total), distance), weight)

    def _compared(self, task: Task, rows: slice, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Policy and reference on some rows: s of each group (N * P,), and the distance of their predictions.

        Args:
            task: of the whole batch.
            rows: of N whole groups, or of some members of one.
            advantages: theirs, (N, P, members).
        """
        reference = self.groups.reference_predictions(task, rows)
        policy = self.groups.predictions(task, rows)
        tiles, members = advantages.shape[1:]
        mine, base = (by_group(self.groups.errors_of(one, task, rows), members, tiles) for one in (policy, reference))
        logits = preference_logit(mine, base, advantages.flatten(0, 1), self.options.beta)
        return logits, F.mse_loss(policy, reference)


def _metrics(loss: Tensor, accuracy: Tensor, distance: Tensor) -> dict[str, Scalar]:
    return {"loss": loss.detach(), "implicit_accuracy": accuracy, "distance": distance.detach()}
