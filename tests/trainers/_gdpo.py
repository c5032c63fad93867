"""GDPO on a tiny pipeline, for the tests of its maths and of its groups."""

import torch

from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.trainers import gdpo, groups
from rewardsr.trainers.gdpo import GDPO, GDPOOptions


class Score:
    """A reward given by a function of `sr`; by default how bright an output is."""

    needs_hq, differentiable, licence = False, True, "Apache-2.0"

    def __init__(self, function=None, kind: str = "fidelity", name: str = "score") -> None:
        self.name, self.kind, self.batches = name, kind, []
        self._function = function or (lambda sr: sr.mean((1, 2, 3)))

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.batches.append(batch)
        return self._function(sr)


def make(base: str, *, trained: bool = False, rewards=None, **options) -> GDPO:
    """The method on the tiny pipeline; `trained` fills the LoRA, so that policy and reference differ."""
    adapter = load_adapter("osediff", base, noise_t=250, net_t=100, scale=1)
    lora.attach(adapter)
    if trained:
        random = torch.Generator().manual_seed(3)
        for parameter in lora.parameters(adapter).values():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=random)
    rewards = rewards or [Score()]
    named = {reward.name: reward for reward in rewards}
    return GDPO(adapter, named, dict.fromkeys(named, 1.0), GDPOOptions(**{"group_size": 3, "beta": 50.0, **options}))


def images(count: int = 1, side: int = 16) -> Batch:
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    return Batch(lq=pixels, hq=pixels, prompts=("a cat", "a much longer text", "a")[:count])


def step(method: GDPO, group: groups.Group, draws=None) -> tuple[dict[str, torch.Tensor], list[gdpo.Loss]]:
    """LoRA gradients and losses of one update; the losses are back-propagated one by one, as the loop does it."""
    own = lora.parameters(method.adapter)
    for parameter in own.values():
        parameter.grad = None
    losses = []
    for loss in method.losses(group, draws or Draws(0, 0, range(len(group.condition)), "update")):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return {name: parameter.grad for name, parameter in own.items()}, losses


def count_rows(adapter) -> list[int]:
    """Rows of each call of the UNet from now on."""
    calls: list[int] = []
    adapter.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())
