"""Floating-point operations of the steps, without memory: networks are on the meta device.

Twice: what the maths needs, as a sum of unit costs; and what the real code does, call by call. That they are equal is
what `test_flops.py` holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from _meter import Meter, watched
from _released import GDPOSR
from _setup import Images, method_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rewardsr import lora
from rewardsr.draws import Draws

META = torch.device("meta")
Counts = dict[str, int]


class _Out(torch.autograd.Function):
    """From the meta device, which has shapes and no values, to numbers on the CPU; gradients go back to shapes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to("meta")


def on_meta(adapter: Any) -> Callable[[Any], Any]:
    """For `watched`: hooks of an adapter whose networks are on the meta device, in a step that runs on the CPU.

    The step's own decisions need numbers (are scores finite, is there a spread), so noise is what networks give it;
    the cost of a network does not depend on values.
    """
    adapter._text_encoder.to = lambda *_: adapter._text_encoder  # it has nothing that could be moved
    adapter.device = torch.device("cpu")  # where the step runs

    def inward(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        return value._map(lambda tensor: tensor.to("meta")) if hasattr(value, "_map") else value

    def around(hook: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if hook.__name__ == "_text":  # it sends the tokens to the device by itself
                adapter.device = META
            try:
                return _Out.apply(hook(*(inward(value) for value in arguments)))
            finally:
                adapter.device = torch.device("cpu")

        return call

    return around


def unit_flops(adapter: Any, side: int) -> Counts:
    """Operations of one pass of each network on one image; the adapter's networks are on the meta device."""
    unet, vae, text = adapter.unet, adapter.vae, adapter._text_encoder
    latent = torch.empty(1, 4, side // adapter.compression, side // adapter.compression, device=META)
    words = torch.empty(1, 77, text.config.hidden_size, device=META)
    time_step = torch.zeros(1, dtype=torch.int64, device=META)

    def cost(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return int(counter.get_total_flops())

    found = {}
    with torch.no_grad():
        found["text"] = cost(lambda: text(torch.zeros(1, 77, dtype=torch.int64, device=META)))
        found["encode"] = cost(lambda: vae.encode(torch.empty(1, 3, side, side, device=META)))
        found["decode"] = cost(lambda: vae.decode(latent))
        with lora.reference(adapter):
            found["reference"] = cost(lambda: unet(latent, time_step, words))
    outputs: list[Tensor] = []
    found["policy"] = cost(lambda: outputs.append(unet(latent, time_step, words).sample))
    found["backward"] = cost(lambda: outputs[0].square().mean().backward())
    _drop_gradients(adapter)
    return found


def gdpo_needs(units: Counts, form: str, images: int, group: int) -> Counts:
    """What GDPO's maths needs, by part: METHODS' sum of unit costs, and nothing else."""
    outputs, passes = images * group, images if form == "shared" else images * group
    needed = {
        "text": images * units["text"],
        "LQ encode": images * units["encode"],
        "group sampling": outputs * units["reference"],
        "decode": outputs * units["decode"],
        "re-encode": outputs * units["encode"],
        "policy forward": passes * units["policy"],
        "backward": passes * units["backward"],
        "reference forward": passes * units["reference"],
    }
    if form != "paper":
        del needed["re-encode"]
    return needed


def gdpo_released(units: Counts, images: int, group: int) -> Counts:
    """What GDPO-SR's released step does, by part: more prompts, and decodes that nothing uses."""
    outputs = images * group
    more = {"text": (images + 2 * outputs) * units["text"], "unused decodes": 2 * outputs * units["decode"]}
    return gdpo_needs(units, "paper", images, group) | more


def count_gdpo(adapter: Any, chosen: Any, form: str, images: int) -> Counts:
    """What the real step does, call by call; the adapter's networks are on the meta device."""
    method = method_of(adapter, chosen, form)
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    indices, meter = list(range(images)), Meter(torch.device("cpu"), count=True)
    with watched(adapter, method, meter, on_meta(adapter)):
        group = method.prepare(Images(chosen.crop, False).batch(0, indices), Draws(0, 0, indices, "group"))
        for loss in method.losses(group, Draws(0, 0, indices, "update-0")):
            loss.value.backward()
    _drop_gradients(adapter)
    return {part: flops for part, flops in meter.flops.items() if flops}


def count_released_gdpo(adapter: Any, second: Any, chosen: Any, images: int) -> Counts:
    """What `_released.GDPOSR` does, call by call."""
    meter = Meter(torch.device("cpu"), count=True)
    step = GDPOSR(
        adapter,
        second,
        lambda sr, batch: torch.empty(images, chosen.group, device=META),
        chosen.group,
        5000,
        meter.part,
    )
    indices = list(range(images))
    batch = Images(chosen.crop, False).batch(0, indices).to(META)
    step.step(batch, Draws(0, 0, indices, "group"), Draws(0, 0, indices, "update-0"))
    _drop_gradients(adapter)
    return {part: flops for part, flops in meter.flops.items() if flops}


def _drop_gradients(adapter: Any) -> None:
    for parameter in lora.parameters(adapter).values():
        parameter.grad = None
