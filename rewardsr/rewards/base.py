"""What a reward is."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from rewardsr.batch import Batch


@runtime_checkable
class Reward(Protocol):
    """Scores super-resolved images: one score a sample, higher is better, never reduced over the batch.

    Attributes:
        name: what the score is called in logs and tables.
        differentiable: whether gradients flow from the score to `sr`.
        needs_hq: whether `batch.hq` must be there.
        licence: SPDX id or short name of the licence of the metric and its weights.
        Options: optional, on the class: subclass of `rewardsr.Options`. The class is then made as
            `Kind(options)`, one without as `Kind()`.
        light: optional; True where the score takes next to no memory, so that a whole batch is scored at once whatever
            `reward_batch` says.
        margin: optional; how far below the base's its mean on held-out images may lie before it counts as a loss, where
            the reward watches a run as one of its `guards`. Without one a recipe says it, or it only watches.
        kind: "fidelity" (agrees with HQ) or "detail" (looks good): the side on which attribute weighting counts it.
    """

    name: str
    differentiable: bool
    needs_hq: bool
    licence: str
    kind: str

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score images.

        Args:
            sr: (B, 3, H, W) float32 RGB in [0, 1].
            batch: the batch that `sr` was made from, row by row: `hq` (B, 3, H, W), `lq` (B, 3, h, w), on its device.

        Returns:
            (B,) float32 scores on sr's device.
        """
        ...
