"""A training method of your own: regression to relative rewards, as in REBEL (arXiv 2404.16767).

rewardsr finetune --trainer custom_trainer:Relative ...     (run in the folder of this file)
"""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Source
from rewardsr.rewards.base import Reward
from rewardsr.trainers.base import Loss, Method
from rewardsr.trainers.groups import Group, GroupOptions, Groups


def relative_loss(log_ratio: Tensor, rewards: Tensor, eta: float) -> Tensor:
    """Mean of ((D_i - D_j) - eta (r_i - r_j))^2 over all pairs of each group, of D and r (B, G)."""
    return 2 * (log_ratio - eta * rewards).var(1).mean()  # for any x, the mean of (x_i - x_j)^2 is twice its variance


class RelativeOptions(GroupOptions):
    eta: float = Field(1.0, gt=0, description="differences in log-ratio per difference in reward")
    beta: float = Field(5000.0, gt=0, description="log-ratio D = -(beta / 2) (L - L_reference) of errors L")


class Relative(Method):
    Options = RelativeOptions
    options: RelativeOptions

    def __init__(
        self, adapter: ISRAdapter, rewards: dict[str, Reward], weights: dict[str, float], options: RelativeOptions
    ) -> None:
        super().__init__(adapter, rewards, weights, options)
        self.groups = Groups(self, "relative")

    def prepare(self, batch: Batch, draws: Source) -> Group:
        return self.groups.sample(batch, draws)

    def losses(self, group: Group, draws: Source) -> Iterator[Loss]:
        task = self.groups.task(group, draws)
        chunks = list(self.groups.chunks(0, len(task.condition)))
        reference = [self.groups.reference_errors(task, rows) for rows in chunks]
        with torch.no_grad():
            policy = [self.groups.errors(task, rows) for rows in chunks]
        # Every D has a part in the slope of the others: all are needed before the first is back-propagated.
        log_ratio = self._log_ratio(torch.cat(policy), torch.cat(reference)).requires_grad_()
        loss = relative_loss(log_ratio.reshape(group.advantages.shape), group.advantages, self.options.eta)
        (slope,) = torch.autograd.grad(loss, log_ratio)
        for rows, old, part in zip(chunks, reference, slope.split([len(old) for old in reference]), strict=True):
            value = (part * self._log_ratio(self.groups.errors(task, rows), old)).sum()
            yield Loss(value, {"loss": loss.detach()}, len(part) / len(slope))

    def _log_ratio(self, policy: Tensor, reference: Tensor) -> Tensor:
        return -self.options.beta / 2 * (policy - reference)
