"""Floating-point operations of the steps, without memory: networks are on the meta device.

Twice: what the maths needs, as a sum of unit costs; and what the real code does, call by call. That they are equal is
what `test_flops.py` holds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _meter import Meter, watched
from _released import GDPOSR, Released, features
from _setup import Images
from _sizes import TOKENS, WIDTH
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from rewardsr import lora
from rewardsr.batch import Condition
from rewardsr.draws import Draws
from rewardsr.rewards.distances import gram

META = torch.device("meta")
Counts = dict[str, int]


class _In(torch.autograd.Function):
    """From numbers on the CPU to the meta device, which has shapes and no values; gradients come back as noise."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.to(META)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _noise(gradients[0])


class _Out(torch.autograd.Function):
    """Back: noise of the same shape; gradients go to shapes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _noise(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to(META)


def _noise(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(like.numel()))


def on_meta(adapter: Any) -> Callable[[Any], Any]:
    """For `watched`: calls of networks that are on the meta device, in a step that runs on the CPU.

    The step's own decisions need numbers (are scores finite, is there a spread), so noise is what networks give it;
    the cost of a network does not depend on values.
    """
    adapter._text_encoder.to = lambda *_: adapter._text_encoder  # it has nothing that could be moved
    adapter.device = torch.device("cpu")  # where the step runs

    def inward(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _In.apply(value)
        return value._map(lambda tensor: tensor.to(META)) if hasattr(value, "_map") else value

    def around(hook: Any) -> Any:
        def call(*arguments: Any) -> Any:
            adapter.device = META  # some send what they are given to the device by themselves
            try:
                return tree_map(_Out.apply, hook(*(inward(value) for value in arguments)))
            finally:
                adapter.device = torch.device("cpu")

        return call

    return around


def unit_flops(adapter: Any, side: int, method: Any = None) -> Counts:
    """Operations of one pass of each network on one image; the networks are on the meta device.

    Args:
        adapter: with our LoRA.
        side: of the image, in HQ pixels.
        method: RFSR, whose style network is looked at, too.
    """
    text, small = adapter._text_encoder, side // adapter.compression
    image = torch.empty(1, 3, side, side, device=META)
    latents = torch.empty(1, 4, small, small, device=META)
    condition = Condition(
        text=torch.empty(1, 77, text.config.hidden_size, device=META),
        latents=latents,
        size=(side, side),
        control=image,
        extras={"ram": torch.empty(1, TOKENS, WIDTH, device=META)},
    )
    time_step = torch.zeros(1, dtype=torch.int64, device=META)

    def cost(function: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return int(counter.get_total_flops())

    def there_and_back(name: str, function: Callable[[], Tensor]) -> None:
        outputs: list[Tensor] = []
        found[name] = cost(lambda: outputs.append(function()))
        found[f"{name} backward"] = cost(lambda: outputs[0].backward())

    found: Counts = {}
    with torch.no_grad():
        found["text"] = cost(lambda: text(torch.zeros(1, 77, dtype=torch.int64, device=META)))
        found["encode"] = cost(lambda: adapter._to_latents(image, None))
        with lora.reference(adapter):
            found["reference"] = cost(lambda: adapter._predict(latents, time_step, condition))
    there_and_back("policy", lambda: adapter._predict(latents, time_step, condition).square().mean())
    _drop_gradients(adapter)
    there_and_back("decode", lambda: adapter._to_image(latents.clone().requires_grad_()).square().mean())
    if getattr(method, "_vgg", None) is not None:
        made: dict[str, Tensor] = {}
        found["style"] = cost(lambda: made.update(features(method._vgg, image.clone().requires_grad_())))
        distance = torch.stack([gram(layer).mean() for layer in made.values()]).sum()
        found["style backward"] = cost(distance.backward)
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
        "backward": passes * units["policy backward"],
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


def rfsr_needs(units: Counts, form: str, images: int, rollout: int) -> Counts:
    """What RFSR's maths needs, by part, after a rollout of so many network passes an image."""
    needed = {
        "text": units["text"],
        "LQ encode": units["encode"],
        "rollout": rollout * units["policy"],
        "policy forward": units["policy"],
        "decode": units["decode"],
        "backward": units["policy backward"] + units["decode backward"],
    }
    if form != "early":
        needed |= {"reference forward": units["reference"], "reference decode": units["decode"]}
        needed["style"] = 2 * units["style"]
        needed["backward"] += units["style backward"]
    return {part: images * flops for part, flops in needed.items() if flops}


def count_ours(method: Any, chosen: Any, images: int) -> Counts:
    """What a real step does, call by call; the networks are on the meta device."""
    adapter = method.adapter
    data, meter = Images(chosen.crop, False), Meter(torch.device("cpu"), count=True)
    if getattr(method, "_vgg", None) is not None:
        method._vgg = partial(features, method._vgg)  # its own forward knows no meta device
    _ignore_rewards(method)
    with watched(adapter, method, meter, on_meta(adapter)):
        # The first one also encodes what is encoded once: the negative prompt of guidance.
        for start in (0,) if adapter.guidance == 1 else (0, images):
            meter.flops, indices = {}, list(range(start, start + images))
            group = method.prepare(data.batch(0, indices), Draws(0, 0, indices, "group"))
            for loss in method.losses(group, Draws(0, 0, indices, "update-0")):
                loss.value.backward()
    _drop_gradients(adapter)
    adapter.device = META
    return {part: flops for part, flops in meter.flops.items() if flops}


def count_released(released: Released, chosen: Any, images: int) -> Counts:
    """What a released step does, call by call; the networks are on the meta device, and so is the step."""
    meter, indices = Meter(torch.device("cpu"), count=True), list(range(images))
    released.part = meter.part
    _ignore_rewards(released.method)
    if isinstance(released, GDPOSR):  # it looks at the scores, of which there are none
        released.judge = lambda sr, batch: torch.empty(images, len(sr) // images, device=META)
    batch = Images(chosen.crop, False).batch(0, indices).to(META)
    released.step(batch, Draws(0, 0, indices, "group"), Draws(0, 0, indices, "update-0"))
    for parameter in released.trained:
        parameter.grad = None
    return {part: flops for part, flops in meter.flops.items() if flops}


def _ignore_rewards(method: Any) -> None:
    for name in method.rewards:
        method.rewards[name] = lambda sr, batch: sr.mean((1, 2, 3))


def _drop_gradients(adapter: Any) -> None:
    for parameter in lora.parameters(adapter).values():
        parameter.grad = None
