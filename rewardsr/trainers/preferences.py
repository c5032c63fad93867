"""The maths of preference methods as pure functions: advantages of a group, and losses of errors.

B images, G outputs each. An error L is a mean square (over C, H, W) of a prediction against what would have given an
output; -(beta / 2) L stands for the log-likelihood of that output.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.checks import check
from rewardsr.errors import TrainingError

STD_FLOOR = 1e-8  # the paper's
# Differences that are rounding, of which normalising would make an order: of a metric's scores, against their size; and
# of combined rewards, which lie in [0, 1].
SCORE_TIE = 1e-5
TIE = 1e-6


def group_advantages(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Advantages of the members of each group (GDPO-SR, arXiv 2603.16769).

    Each metric is min-max normalised inside the group, r = sum of weight * metric, A = (r - mean) / (std + 1e-8)
    with the unbiased std.
    A metric whose scores in a group differ by less than 1e-5 of their size contributes 0 there; a fully tied group and
    a group of one get zero advantages.

    Args:
        scores: per metric (B, G), higher is better.
        weights: per metric (B,), not negative; only their shares count.

    Returns:
        (B, G) float32.

    Raises:
        TrainingError: a score is not finite; the metric is named.
    """
    if not scores:
        raise ValueError("group_advantages: no scores")
    whole = torch.stack([weights[name].float() for name in scores]).sum(0)
    parts = []
    for name, values in scores.items():
        check(
            values.isfinite().all(),
            lambda name=name: TrainingError(f"reward '{name}' gave a score that is not finite"),  # type: ignore[misc]
        )
        low, spread = values.amin(1, keepdim=True), values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
        differs = spread > SCORE_TIE * values.abs().amax(1, keepdim=True)
        share = torch.where(whole > 0, weights[name] / whole.where(whole > 0, 1.0), 0.0).to(values)
        parts.append(share.unsqueeze(1) * torch.where(differs, (values - low) / spread.where(differs, 1.0), 0.0))
    total = torch.stack(parts).sum(0)
    if total.shape[1] < 2:
        return torch.zeros_like(total)
    std = total.std(1, keepdim=True)
    return torch.where(std > TIE, (total - total.mean(1, keepdim=True)) / (std + STD_FLOOR), 0.0)


def preference_logit(policy_error: Tensor, reference_error: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """s (B,) = -beta/2 * sum_g A_g (L_g - L_g^ref), how far the policy prefers what is better (GDPO-SR).

    Args:
        policy_error: (B, G) mean squared errors of the policy's predictions.
        reference_error: (B, G) of the reference's, on the same inputs.
        advantages: (B, G).
        beta: strength of the preference.
    """
    return -beta / 2 * (advantages * (policy_error - reference_error)).sum(1)


def gdpo_loss(s: Tensor) -> tuple[Tensor, Tensor]:
    """The GDPO loss of `preference_logit` (B,): -logsigmoid(s), mean over the groups (GDPO-SR).

    Returns:
        The loss and the implicit accuracy (share of s > 0), both scalars.
    """
    return -F.logsigmoid(s).mean(), (s > 0).float().mean().detach()
