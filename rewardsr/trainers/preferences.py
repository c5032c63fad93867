"""The maths of preference methods as pure functions: advantages of a group, and losses of errors.

B images, G outputs each. An error L is a mean square (over C, H, W) of a prediction against what would have given an
output; -(beta / 2) L stands for the log-likelihood of that output.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.errors import TrainingError

STD_FLOOR = 1e-8  # the paper's
TIE = 1e-6  # combined rewards lie in [0, 1]: a spread below this is rounding, and normalising it would make noise of it


def group_advantages(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Advantages of the members of each group (GDPO-SR, arXiv 2603.16769).

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
    """s (B,) = -beta/2 * sum_g A_g (L_g - L_g^ref), of (B, G) errors and advantages (GDPO-SR)."""
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
