"""The released steps as the benchmarks have them are the same maths as ours: what is compared is cost alone."""

from argparse import Namespace

import pytest
import torch
from _memory import Storages, unless_out_of_memory
from _setup import Images, make_adapter, method_of, released_of, seconds_of
from _sizes import vgg_file

from rewardsr import lora
from rewardsr.draws import Draws

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
        if parameter.grad is not None:
            found.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(found)


def chosen(**changed: object) -> Namespace:
    usual = {
        **{"size": "tiny", "crop": 64, "adapter": "osediff", "trainer": "gdpo", "group": 3, "rewards": "psnr,detail"},
        **{"micro_batch": None, "gradient_checkpointing": False, "compile": False, "sampler_steps": 5, "vgg": None},
    }
    return Namespace(**{**usual, **changed})


def sources(count: int) -> list[Draws]:
    return [Draws(0, 0, list(range(count)), stream) for stream in ("group", "update-0")]


def ours(method, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradients of our step."""
    first, then = sources(len(batch))
    loss = next(iter(method.losses(method.prepare(batch, first), then))).value
    loss.backward()
    return loss.detach(), gradients(method.adapter)


@pytest.mark.parametrize("count", [1, 2])
def test_gdpo_has_the_same_loss_and_gradients(count) -> None:
    options = chosen()
    adapter = make_adapter(options, CPU, torch.float32)
    second = seconds_of(adapter, options, CPU, torch.float32)
    trained(adapter)
    method, batch = method_of(adapter, options, "paper"), Images(64, False).batch(0, list(range(count)))
    method.options = method.options.model_copy(update={"beta": 50.0})  # the paper's would saturate here
    loss, gradient = ours(method, batch)
    theirs = released_of(method, options, second).step(batch, *sources(count))
    assert_close(loss, theirs, 1e-5)
    assert 0.01 < float(theirs) < 10 and abs(float(theirs) - 0.6931) > 1e-3, "saturated, or policy equals reference"
    assert_close(gradient, gradients(adapter), 1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_rfsr_has_the_same_loss_and_gradients(count, tmp_path) -> None:
    options = chosen(trainer="rfsr", rollout="none", rewards="detail", vgg=vgg_file(tmp_path, "tiny"))
    adapter = make_adapter(options, CPU, torch.float32)
    second = seconds_of(adapter, options, CPU, torch.float32)
    trained(adapter)
    method, batch = method_of(adapter, options, "whole"), Images(64, False).batch(0, list(range(count)))
    method.options = method.options.model_copy(update={"kl_weight": 1.0})  # the paper's would hide mistakes
    loss, gradient = ours(method, batch)
    theirs = released_of(method, options, second).step(batch, *sources(count))
    assert_close(loss, theirs, 1e-5)
    assert_close(gradient, gradients(adapter), 1e-3)


@pytest.mark.parametrize("form", ["early", "late"])
def test_rfsr_on_seesr_has_the_same_gradients_of_the_weights(form, tmp_path) -> None:
    """There, weights are trained in full: for a fresh LoRA, the gradient of B is scale * gradient of W * A'.

    Of the style only the target differs, which is plain Stable Diffusion's.
    """
    vgg = vgg_file(tmp_path, "tiny")
    options = chosen(trainer="rfsr", adapter="seesr", rollout="none", rewards="detail", vgg=vgg)
    adapter = make_adapter(options, CPU, torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # its last convolutions are zero at first
        for parameter in adapter.controlnet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    second = seconds_of(adapter, options, CPU, torch.float32)
    lora.attach(adapter)
    method, batch = method_of(adapter, options, form), Images(64, False).batch(0, [0])
    method.windows.pop("kl", None)
    loss, _ = ours(method, batch)
    released = released_of(method, options, second)
    assert_close(loss, released.step(batch, *sources(1)), 1e-5)
    first, then = sources(1)
    next(iter(method.losses(method.prepare(batch, first), then))).value.backward()
    own, checked = lora.parameters(adapter), 0
    for component, network in (("unet", released.unet), ("controlnet", released.controlnet)):
        for name, weight in network.named_parameters():
            key = f"{component}.{name.removesuffix('.weight')}"
            if weight.grad is None or f"{key}.lora_B.weight" not in own or not name.endswith(".weight"):
                continue
            a, b = (own[f"{key}.lora_{matrix}.weight"] for matrix in "AB")
            expected = 8 / 4 * weight.grad.flatten(1) @ a.detach().flatten(1).T
            assert_close(b.grad.flatten(1), expected, 1e-3)
            checked += 1
    assert checked == len(own) // 2


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm() / theirs.norm()) <= tolerance


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


def test_lack_of_memory_ends_one_measurement() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert unless_out_of_memory(lambda: 3, CPU) == 3
    assert unless_out_of_memory(lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), CPU) is None
    with pytest.raises(RuntimeError, match="another"):
        unless_out_of_memory(lambda: fail(RuntimeError("another")), CPU)
