"""Whether gradients reach the images through a reward, tried out before training relies on it."""

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError, one_line
from rewardsr.rewards.base import Reward

ADVICE = "choose a differentiable one (`rewardsr rewards` lists them), or give it weight 0 so that it only watches"


def probe_gradient(name: str, reward: Reward, batch: Batch) -> None:
    """Score two images, and look at the gradient; works inside `torch.no_grad` as well.

    They are made of the batch's HQ images (LQ images, where there are none), a little paler and noisier: on HQ images
    themselves psnr, say, is at its best and has no gradient. The noise is the same every time.

    Args:
        name: what the recipe calls the reward, for messages.
        reward: the reward.
        batch: images of the kind that training will bring; one is enough.

    Raises:
        UserError: gradients do not flow, are zero or not finite, belong to another image, or the reward fails.
    """
    if not reward.differentiable:
        raise _refusal(name, "it says so itself")
    rows = batch.repeat(2) if len(batch) == 1 else batch.rows(torch.arange(2))
    sr = _perturbed(rows.lq if rows.hq is None else rows.hq)
    try:
        with torch.enable_grad():
            sr.requires_grad_()
            scores = reward(sr, rows)
            if tuple(scores.shape) != (len(rows),):
                raise UserError(
                    f"reward '{name}' gave {tuple(scores.shape)} for {len(rows)} images, expected one score each"
                )
            gradients = _gradients(scores, sr)
    except UserError:
        raise
    except Exception as error:  # a reward may be a stranger's
        raise UserError(f"reward '{name}' fails when its gradient is tried: {one_line(error)}") from error
    _judge(name, gradients)


def _perturbed(image: Tensor) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image.device)
    return (0.9 * image.detach().float() + 0.05 + 0.02 * noise).clamp(0, 1)


def _gradients(scores: Tensor, sr: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of the sum of scores, and of the first score; None where no graph leads from the scores to `sr`."""
    if not scores.requires_grad:
        return None
    (of_sum,) = torch.autograd.grad(scores.sum(), sr, retain_graph=True, allow_unused=True)
    (of_first,) = torch.autograd.grad(scores[0], sr, allow_unused=True)
    return None if of_sum is None or of_first is None else (of_sum, of_first)


def _judge(name: str, gradients: tuple[Tensor, Tensor] | None) -> None:
    if gradients is None:
        raise _refusal(name, "the graph from its scores to the images is cut (a detach, no_grad or numpy on the way)")
    of_sum, of_first = gradients
    if not (of_sum.isfinite().all() and of_first.isfinite().all()):
        raise _refusal(name, "its gradient is not finite")
    if not of_sum.any():
        raise _refusal(name, "its gradient is zero everywhere (rounding or a saturated function on the way)")
    if not of_first[0].any():
        raise _refusal(name, "the gradient of an image's score does not reach that image")


def _refusal(name: str, why: str) -> UserError:
    return UserError(f"reward '{name}' is not differentiable: {why}; {ADVICE}")
