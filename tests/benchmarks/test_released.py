"""The released steps as the benchmarks have them are the same maths as ours: what is compared is cost alone."""

import copy
from argparse import Namespace

import pytest
import torch
from _memory import Storages
from _released import GDPOSR
from _setup import Images, judge, method_of
from _sizes import pipeline

from rewardsr import lora
from rewardsr.draws import Draws


def trained(adapter) -> None:
    """A LoRA that is on, so that policy and reference differ."""
    lora.attach(adapter)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))


def gradients(adapter) -> torch.Tensor:
    """Of the LoRA, in one, which are gone then."""
    found = []
    for parameter in lora.parameters(adapter).values():
        found.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(found)


@pytest.mark.parametrize("count", [1, 2])
def test_gdpo_has_the_same_loss_and_gradients(count) -> None:
    adapter = pipeline("tiny", torch.device("cpu"), torch.float32)
    second = copy.deepcopy(adapter.unet)
    trained(adapter)
    method = method_of(adapter, Namespace(group=3, micro_batch=None, rewards="psnr,detail"), "paper")
    batch, indices = Images(64, False).batch(0, list(range(count))), list(range(count))

    def sources() -> list[Draws]:
        return [Draws(0, 0, indices, stream) for stream in ("group", "update-0")]

    first, then = sources()
    loss = next(iter(method.losses(method.prepare(batch, first), then))).value
    loss.backward()
    ours = gradients(adapter)
    theirs_loss = GDPOSR(adapter, second, judge(method), 3, 5000).step(batch, *sources())
    theirs = gradients(adapter)
    assert abs(float(loss.detach() - theirs_loss)) <= 5e-4 * max(1, float(theirs_loss))
    assert float(theirs_loss) > 1e-3 and abs(float(theirs_loss) - 0.6931) > 1e-3, "saturated, or nothing was trained"
    assert float((ours - theirs).norm() / theirs.norm()) <= 5e-3


def test_working_memory_is_that_of_live_tensors() -> None:
    before = torch.zeros(1000)
    with Storages() as storages:
        one = before + 1  # 4,000 bytes
        two = one.view(10, 100) * 2  # 8,000: a view is nobody's memory
        del one
        assert storages.alive == 4000
        before.add_(1)
        three = two + 1
        assert storages.alive == 8000
    del two, three
    assert (storages.alive, storages.peak) == (0, 8000)
