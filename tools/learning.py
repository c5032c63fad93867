"""How the networks of the embedded pipeline learn: AdamW with warm-up and cosine, and averaged weights to be saved."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class Learner:
    """Takes the steps of a network, and keeps the moving average of its weights.

    Args:
        network: of which what has gradients is trained.
        lr: learning rate after warm-up; it falls to a hundredth of that at the end.
        steps: of the whole training.
        warm_up: steps over which the rate rises.
        decay: of the moving average, later on.

    Attributes:
        average: the network with averaged weights.
    """

    def __init__(self, network: nn.Module, lr: float, steps: int, warm_up: int = 200, decay: float = 0.999) -> None:
        self.network = network
        self.average: Any = copy.deepcopy(network)
        self.lr, self.steps, self.warm_up, self.decay = lr, steps, warm_up, decay
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)

    def step(self, step: int, loss: Tensor) -> None:
        """Step number `step`, from 1 on, down the gradient of `loss`."""
        for group in self.optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
            group["lr"] = self.lr * min(1, step / self.warm_up) * (0.01 + 0.99 * cosine)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        keep = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - keep)
