"""Checks of adapters and rewards: an author calls them and is told everything that breaks the contract."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.options import Options, marked_for_lora
from rewardsr.rewards.base import Reward
from rewardsr.schedule import Schedule

EQUAL = 1e-4  # rows of a batch against the same rows alone: other summation orders, float32
NOT_STRICT = "Options is no subclass of rewardsr.Options, which refuses keys that it does not know"
ATTRIBUTES = ("scale", "size_multiple", "schedule", "steps", "networks", "trainable", "lora_targets", "base_model")


def check_adapter(adapter: ISRAdapter) -> None:
    """Check an adapter against the contract of `rewardsr.adapter`, on a 12 x 10 image; leaves a LoRA attached.

    Everything runs in the adapter's own precision, and the outputs once more in bfloat16 on the CPU.

    Raises:
        AssertionError: lists everything that is wrong, one line each.
    """
    report(f"adapter '{adapter.name}'", _adapter_problems(adapter))


def check_reward(reward: Reward, side: int = 32) -> None:
    """Check a reward against the contract of `rewardsr.rewards.base`.

    Args:
        reward: the reward.
        side: of the images it is tried on, in pixels.

    Raises:
        AssertionError: lists everything that is wrong, one line each.
    """
    report(f"reward '{reward.name}'", _reward_problems(reward, side))


def report(what: str, problems: Iterator[str]) -> None:
    """Collect problems; an exception on the way is one of them.

    Raises:
        AssertionError: there are any; it lists them, one line each.
    """
    found: list[str] = []
    try:
        found.extend(problems)
    except Exception as error:  # an author wants the message, whatever the kind
        found.append(f"raised {type(error).__name__}: {error}")
    if found:
        raise AssertionError(f"{what} breaks the contract:\n" + "\n".join(f"- {line}" for line in found))


def tensor_problems(what: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    """What is wrong with a result: another shape, another dtype than float32, values that are not finite."""
    if tuple(tensor.shape) != shape:
        yield f"{what}: gave {tuple(tensor.shape)}, expected {shape}"
    if tensor.dtype != torch.float32:
        yield f"{what}: gave {tensor.dtype}, expected float32"
    if not tensor.isfinite().all():
        yield f"{what}: gave values that are not finite"


def _adapter_problems(adapter: ISRAdapter) -> Iterator[str]:
    lacking = [attribute for attribute in ATTRIBUTES if not hasattr(adapter, attribute)]
    if lacking:
        yield f"attribute '{lacking[0]}' is missing"
        return
    batch = Batch(lq=torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)), prompts=("a photo", "a cat"))
    yield from _attribute_problems(adapter)
    with torch.no_grad():
        yield from _shape_problems(adapter, batch)
        yield from _sampler_problems(adapter, batch)
        yield from _draw_problems(adapter, batch)
    yield from _lora_problems(adapter, batch)
    yield from _gradient_problems(adapter)
    with torch.no_grad(), _in_bfloat16(adapter):
        for problem in _bfloat16_problems(adapter, batch):
            yield f"in bfloat16: {problem}"


def _attribute_problems(adapter: ISRAdapter) -> Iterator[str]:
    if not (isinstance(adapter.Options, type) and issubclass(adapter.Options, Options)):
        yield NOT_STRICT
    elif (marked := marked_for_lora(adapter.Options)) and not isinstance(getattr(adapter, "options", None), Options):
        yield f"options: '{min(marked)}' is marked FOR_LORA, but the adapter does not keep its Options as `options`"
    schedule, steps = adapter.schedule, tuple(adapter.steps)
    if not isinstance(schedule, Schedule):
        yield f"schedule is {type(schedule).__name__}, expected a rewardsr.schedule.Schedule (VP, Flow)"
    elif not steps or not all(one > other for one, other in zip(steps, (*steps[1:], schedule.end), strict=True)):
        yield f"steps are {steps}, expected times that fall to more than {schedule.end}"
    elif steps[0] > schedule.last:
        yield f"steps begin at {steps[0]}, but the schedule's last time is {schedule.last}"
    unknown = sorted(set(adapter.trainable) - set(adapter.networks))
    if unknown:
        yield f"trainable names '{unknown[0]}', which is none of networks"
    untargeted = sorted(set(adapter.trainable) - set(adapter.lora_targets))
    if untargeted:
        yield f"lora_targets has no entry '{untargeted[0]}'"


def _shape_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    condition = adapter.encode(batch)
    expected = (batch.lq.shape[-2] * adapter.scale, batch.lq.shape[-1] * adapter.scale)
    if condition.size != expected:
        yield f"encode: condition.size is {condition.size}, expected scale x lq = {expected}"
    z = adapter.start(condition, Draws(0, 0, [0, 1]))
    yield from tensor_problems("start", z, tuple(condition.latents.shape))
    prediction = adapter.predict(z, adapter.net_t, condition)
    yield from tensor_problems("predict", prediction, tuple(z.shape))
    image = adapter.to_image(z)
    latents = adapter.to_latents(image.clamp(0, 1))
    yield from tensor_problems("to_latents", latents, tuple(z.shape))
    for height, width in ((1, 1), (7, 5)):
        sr = adapter.sample(adapter.encode(torch.rand(1, 3, height, width)), Draws(0, 0, [0]))
        yield from tensor_problems("sample", sr, (1, 3, height * adapter.scale, width * adapter.scale))
    try:
        adapter.encode(batch.lq * 2 - 1)
        yield "encode: accepts images in [-1, 1]; keep the public method and write _encode"
    except ValueError:
        pass


def _sampler_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    """`transition` from the first step to the second, and from the last one to z0."""
    condition = adapter.encode(batch)
    z = adapter.start(condition, Draws(0, 0, [0, 1]))
    times = (*adapter.steps, adapter.schedule.end)
    for t, t_next in {(times[0], times[1]), (times[-2], times[-1])}:
        mean, std = adapter.transition(z, adapter.predict(z, t, condition), t, t_next)
        yield from tensor_problems("transition", mean, tuple(z.shape))
        spread = torch.as_tensor(std)
        if not (spread.isfinite() & (spread >= 0)).all():
            yield f"transition: the standard deviation from {t} to {t_next} is {std}, expected 0 or more"
        if t_next == adapter.schedule.end and spread.any():
            yield "transition: the last step, to z0, draws noise"


def _draw_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    def run(indices: list[int], seed: int) -> Tensor:
        draws = Draws(seed, 0, indices)
        return adapter.sample(adapter.encode(batch.rows(torch.tensor(indices)), generator=draws), draws)

    both = run([0, 1], 0)
    if not torch.equal(both, run([0, 1], 0)):
        yield "sample: two runs with equal draws differ; take all randomness from rewardsr.draws.draw"
    if float((both[1:] - run([1], 0)).abs().max()) > EQUAL:
        yield "sample: a row depends on the other rows of its batch"
    differ = not torch.equal(both, run([0, 1], 1))
    condition = adapter.encode(batch)
    by_start = not torch.equal(
        adapter.start(condition, Draws(0, 0, [0, 1])), adapter.start(condition, Draws(1, 0, [0, 1]))
    )
    if adapter.deterministic and by_start:
        yield "deterministic is True, but start draws noise"
    if not adapter.deterministic and not (differ and by_start):
        yield "deterministic is False, but other draws give the same start"


def _lora_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    """A LoRA may sit on any network, so gradients are followed from the image back through the encoding."""
    with torch.no_grad():
        before = _one_step(adapter, batch)
    if not lora.attached(adapter):
        lora.attach(adapter)
        with torch.no_grad():
            if not torch.equal(before, _one_step(adapter, batch)):
                yield "a fresh LoRA changes the output"
    for component in sorted(_encoding(adapter, batch) - set(adapter.encoders)):
        yield f"encode: a LoRA on '{component}' changes its result, but `encoders` does not name '{component}'"
    image = _one_step(adapter, batch)
    if image.requires_grad:
        image.square().mean().backward()
    unreached = [name for name, parameter in lora.parameters(adapter).items() if parameter.grad is None]
    if unreached:
        yield (
            f"no gradient reaches {len(unreached)} LoRA tensors (first: {unreached[0]}) "
            "through encode, start, predict, schedule.x0 and to_image"
        )
    _forget_gradients(adapter)


def _encoding(adapter: ISRAdapter, batch: Batch) -> set[str]:
    """Components whose LoRA takes part in the encoding."""
    condition = adapter.encode(batch)
    tensors = [value for value in (*vars(condition).values(), *condition.extras.values()) if isinstance(value, Tensor)]
    following = [tensor.square().mean() for tensor in tensors if tensor.requires_grad]
    if following:
        torch.stack(following).sum().backward()
    reached = {name.partition(".")[0] for name, p in lora.parameters(adapter).items() if p.grad is not None}
    _forget_gradients(adapter)
    return reached


def _forget_gradients(adapter: ISRAdapter) -> None:
    for parameter in lora.parameters(adapter).values():
        parameter.grad = None


def _one_step(adapter: ISRAdapter, batch: Batch) -> Tensor:
    """The image (B, 3, H', W') of one unguided step from the start."""
    condition = adapter.encode(batch)
    z, t = adapter.start(condition, Draws(0, 0, [0, 1])), adapter.steps[0]
    return adapter.to_image(adapter.schedule.x0(z, adapter.predict(z, t, condition), t))


def _gradient_problems(adapter: ISRAdapter) -> Iterator[str]:
    image = torch.rand(1, 3, 12 * adapter.scale, 10 * adapter.scale, device=adapter.device)
    with torch.no_grad():
        latents = adapter.to_latents(image)
    for name, hook, given in (("to_image", adapter.to_image, latents), ("to_latents", adapter.to_latents, image)):
        if not _differentiable(hook, given.requires_grad_()):
            yield f"{name}: gradients do not follow"


def _bfloat16_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    rounded = [name for name, parameter in lora.parameters(adapter).items() if parameter.dtype != torch.float32]
    if rounded:
        yield f"to: the LoRA is in {lora.parameters(adapter)[rounded[0]].dtype}, expected float32 always"
    try:
        yield from _shape_problems(adapter, batch)
        yield from _sampler_problems(adapter, batch)
    except Exception as error:  # says where it was raised, unlike that of the caller
        yield f"raised {type(error).__name__}: {error}"


@contextmanager
def _in_bfloat16(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, the networks compute in bfloat16 on the CPU; afterwards they have the very tensors of before."""
    device, dtype = adapter.device, adapter.dtype
    modules = [module for network in adapter.networks.values() for module in network.modules()]
    weights = [(parameter, parameter.data) for module in modules for parameter in module.parameters(recurse=False)]
    buffers = [(module, dict(module._buffers)) for module in modules]
    adapter.to("cpu", torch.bfloat16)
    try:
        yield
    finally:
        adapter.to(device, dtype)
        for parameter, own in weights:
            parameter.data = own
        for module, its in buffers:
            module._buffers.update(its)


def _differentiable(hook: Callable[[Tensor], Tensor], given: Tensor) -> bool:
    result = hook(given)
    if not result.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(result.square().mean(), given)
    return bool(gradient.isfinite().all() and gradient.any())


def _reward_problems(reward: Reward, side: int) -> Iterator[str]:
    for attribute in ("name", "differentiable", "needs_hq", "licence", "kind"):
        if not hasattr(reward, attribute):
            yield f"attribute '{attribute}' is missing"
            return
    if reward.kind not in ("fidelity", "detail"):
        yield f"kind is '{reward.kind}', expected 'fidelity' or 'detail'"
    random = torch.Generator().manual_seed(0)
    hq = torch.rand(3, 3, side, side, generator=random)
    lq = torch.nn.functional.interpolate(hq, scale_factor=0.25, mode="area")
    sr = (hq + 0.1 * torch.randn(hq.shape, generator=random)).clamp(0, 1)
    batch = Batch(lq=lq, hq=hq if reward.needs_hq else None, prompts=("a photo", "a cat", ""))
    yield from _score_problems(reward, sr, batch)


def _score_problems(reward: Reward, sr: Tensor, batch: Batch) -> Iterator[str]:
    scores = reward(sr, batch)
    yield from tensor_problems("score", scores, (3,))
    if tuple(scores.shape) != (3,):
        return
    alone = torch.cat([reward(sr[i : i + 1], batch.rows(torch.tensor([i]))) for i in range(3)])
    if alone.shape == scores.shape and float((alone - scores).abs().max()) > EQUAL * (1 + float(scores.abs().max())):
        yield "a score depends on the other images of its batch"
    if reward.differentiable and not _differentiable(lambda x: reward(x, batch), sr.clone().requires_grad_()):
        yield "differentiable is True, but its gradient is zero, not finite or cut"
