"""Checks of training methods: an author calls them and is told everything that breaks the contract."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.options import Options, parse
from rewardsr.pipelines import load_adapter
from rewardsr.rewards.base import Reward
from rewardsr.rewards.detail import Detail
from rewardsr.testing.checks import NOT_STRICT, report
from rewardsr.testing.networks import tiny_pipeline
from rewardsr.trainers.base import Loss, Method

IMAGES = 2
CHUNKED = 1e-3  # gradient of chunks against that of all at once: norm of the difference, relative


def check_trainer(
    kind: type[Method],
    adapter: ISRAdapter | None = None,
    rewards: Mapping[str, Reward] | None = None,
    options: Mapping[str, Any] | None = None,
    side: int = 32,
) -> None:
    """Check a training method against the contract of `rewardsr.trainers.base`, on two small images.

    Args:
        kind: the method's class.
        adapter: a pipeline that the method trains, without a LoRA, which is left attached; by default a tiny one-step
            pipeline that starts from noised latents.
        rewards: by name, of weight 1; by default "detail", which is differentiable.
        options: of the method, as in a recipe's `trainer_options`.
        side: of the images in output pixels; rounded up to a multiple of the pipeline's scale.

    Raises:
        AssertionError: lists everything that is wrong, one line each.
    """
    name = getattr(kind, "__name__", repr(kind))
    with tempfile.TemporaryDirectory() as folder:
        if adapter is None:
            adapter = load_adapter("osediff", tiny_pipeline(Path(folder)), noise_t=250, net_t=100)
        check = _Check(kind, adapter, rewards or {"detail": Detail()}, options or {}, side)
        report(f"trainer '{name}'", check.problems())


class _Check:
    """One method on one pipeline; see `check_trainer`."""

    def __init__(
        self,
        kind: type[Method],
        adapter: ISRAdapter,
        rewards: Mapping[str, Reward],
        options: Mapping[str, Any],
        side: int,
    ) -> None:
        self.kind, self.adapter, self.rewards, self.options = kind, adapter, dict(rewards), dict(options)
        random = torch.Generator().manual_seed(0)
        small = -(-side // adapter.scale)
        lq = torch.rand(IMAGES, 3, small, small, generator=random)
        hq = torch.rand(IMAGES, 3, small * adapter.scale, small * adapter.scale, generator=random)
        self.batch = Batch(lq, hq, ("a photo", "a cat")).to(adapter.device)

    def problems(self) -> Iterator[str]:
        if not (isinstance(self.kind, type) and issubclass(self.kind, Method)):
            yield "is no subclass of rewardsr.trainers.base.Method"
            return
        if not (isinstance(self.kind.Options, type) and issubclass(self.kind.Options, Options)):
            yield NOT_STRICT
            return
        options = parse(self.kind.Options, self.options, "options")
        targets = self.kind.lora_targets(self.adapter, options)
        if targets and not lora.attached(self.adapter):
            lora.attach(self.adapter, targets=targets)
        method = self.make()
        yield from self.group_problems(method)
        group = method.prepare(self.batch, self.draws("group"))
        fresh = self.gradient(method, method.losses(group, self.draws("update-0")))
        if not (fresh.isfinite().all() and fresh.any()):
            yield "losses: the gradient of a fresh LoRA is zero or not finite"
        self.disturb(method)
        yield from self.prepare_problems(method)
        group = method.prepare(self.batch, self.draws("group"))
        yield from self.loss_problems(method, group)
        yield from self.chunk_problems(method, group)
        yield from self.state_problems(method)

    # ---- what checks need ----

    def make(self, **changes: Any) -> Method:
        """The method, with its options changed."""
        options = parse(self.kind.Options, self.options | changes, "options")
        return self.kind(self.adapter, self.rewards, dict.fromkeys(self.rewards, 1.0), options)

    def draws(self, stream: str) -> Draws:
        return Draws(0, 0, range(IMAGES), stream)

    @torch.no_grad()
    def disturb(self, method: Method) -> None:
        """As if training had begun: policy and reference differ."""
        random = torch.Generator().manual_seed(1)
        for parameter in method.trained_weights().values():
            noise = torch.randn(parameter.shape, generator=random).to(parameter.device)
            parameter.add_(noise, alpha=0.02)

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the pipeline makes of the images as it is now."""
        draws = self.draws("output")
        return self.adapter.sample(self.adapter.encode(self.batch, generator=draws), draws)

    def weights(self) -> list[Tensor]:
        """Copies of all weights of the pipeline."""
        return [parameter.detach().clone() for parameter in self.everything().values()]

    def everything(self) -> dict[str, Tensor]:
        """All weights of the pipeline, its LoRAs among them."""
        networks = self.adapter.networks.items()
        return {f"{name}.{key}": p for name, network in networks for key, p in network.named_parameters()}

    def gradient(self, method: Method, losses: Iterator[Loss]) -> Tensor:
        """The gradient of all losses in what is trained, flat."""
        parameters = list(method.trained_weights().values())
        for parameter in parameters:
            parameter.grad = None
        for loss in losses:
            with torch.enable_grad():  # where a method has switched it off, `loss_problems` says so
                if loss.value.requires_grad:
                    loss.value.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([part.flatten() for part in found])

    # ---- the rules ----

    def group_problems(self, method: Method) -> Iterator[str]:
        groups = method.trained
        names = [group.name for group in groups]
        if len(set(names)) < len(names):
            yield f"parameters: two groups have one name: {', '.join(names)}"
        parameters = [parameter for group in groups for parameter in group.parameters.values()]
        if not parameters or len(parameters) > len(set(map(id, parameters))):
            yield "parameters: there are none, or one is in two groups"
        for key, parameter in method.trained_weights().items():
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                yield f"parameters: {key} is frozen or in {parameter.dtype}, expected trainable float32"

    def prepare_problems(self, method: Method) -> Iterator[str]:
        before, results = self.weights(), []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # what does not come from the draws differs between the two
                results.append(method.prepare(self.batch, self.draws("group")))
        if not _equal(*results):
            yield "prepare: equal batches and draws give different results; take all randomness from the draws"
        if any(tensor.requires_grad for tensor in _tensors(results[0])):
            yield "prepare: its result carries gradients; it belongs under torch.no_grad"
        if not isinstance(getattr(results[0], "metrics", None), Mapping):
            yield "prepare: its result has no `metrics`"
        if not _equal(before, self.weights()):
            yield "prepare: changes the weights of the pipeline"

    def loss_problems(self, method: Method, group: Any) -> Iterator[str]:
        before, policy, weight = self.weights(), self.output(), 0.0
        everything = self.everything()
        for parameter in everything.values():
            parameter.grad = None
        found: dict[str, None] = {}  # each once, although every loss may have it
        for loss in method.losses(group, self.draws("update-0")):
            if not torch.is_grad_enabled():
                found["losses: yields inside no_grad, which stays on in the loop"] = None
            if not torch.equal(self.output(), policy):
                found["losses: yields inside `reference`, or has changed the pipeline"] = None
            with torch.enable_grad():
                if loss.value.requires_grad:
                    loss.value.backward()
            if not loss.value.isfinite().all():
                found["losses: one is not finite"] = None
            weight += loss.weight
        yield from found
        if abs(weight - 1) > 1e-6:
            yield f"losses: their weights add up to {weight:g}, expected 1"
        trained = method.trained_weights()
        without = [key for key, parameter in trained.items() if parameter.grad is None]
        if without:
            yield f"losses: no gradient reaches {len(without)} of {len(trained)} parameters (first: {without[0]})"
        own = {id(parameter) for parameter in trained.values()}
        others = [key for key, p in everything.items() if p.grad is not None and id(p) not in own]
        if others:
            yield f"losses: a gradient reaches {others[0]}, which is in no group of `parameters`"
        if not _equal(before, self.weights()):
            yield "losses: changes the weights of the pipeline"

    def chunk_problems(self, method: Method, group: Any) -> Iterator[str]:
        if "micro_batch" not in self.kind.Options.model_fields:
            return
        whole = self.gradient(method, method.losses(group, self.draws("update-0")))
        for rows in (1, 3):
            chunked = self.make(micro_batch=rows)
            parts = self.gradient(chunked, chunked.losses(group, self.draws("update-0")))
            off = float((parts - whole).norm() / whole.norm().clamp(min=1e-12))
            if not off <= CHUNKED:
                yield f"losses: with micro_batch {rows} the gradient is off by {off:.1g} of its norm"

    def state_problems(self, method: Method) -> Iterator[str]:
        self.disturb(method)
        method.after_update()
        trained = self.weights()
        with method.shipped():
            shipped = self.weights()
        if not _equal(trained, self.weights()):
            yield "shipped: does not give the trained weights back"
        state = method.state_dict()
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if wrong:
            yield f"state_dict: '{wrong[0]}' is {type(state[wrong[0]]).__name__}, expected a tensor"
            return
        saved = {name: value.detach().clone() for name, value in state.items()}
        resumed = self.make()
        resumed.load_state_dict(saved)
        if not _equal(saved, dict(resumed.state_dict())):
            yield "state_dict: a method that has loaded it gives another one"
        with resumed.shipped():
            if not _equal(shipped, self.weights()):
                yield "state_dict: a method that has loaded it ships other weights"


def _parts(value: Any) -> list[Any] | None:
    """What a dataclass, a mapping or a sequence consists of; None for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        return [list(value), *value.values()]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a result."""
    if isinstance(value, Tensor):
        return [value]
    return list(chain.from_iterable(map(_tensors, _parts(value) or [])))


def _equal(one: Any, other: Any) -> bool:
    """Whether two results are equal bit for bit; of objects that cannot be looked into, whether their types are."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    left, right = _parts(one), _parts(other)
    if left is not None and right is not None:
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(one, float | int | str | None):
        return bool(one == other)
    return type(one) is type(other)
