"""A run's set-up as `rewardsr.train.prepare` would make it, on networks and images that were never in a file."""

import copy
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _released import GDPOSR, Released, RFSRStep, SeeSRStep
from _sizes import CROPS, SIZES, TOKENS, WIDTH, images, pipeline, plain_unet, seesr_networks
from accelerate import Accelerator
from torch import Tensor, nn

from rewardsr import lora
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.options import parse
from rewardsr.rewards import build
from rewardsr.train import loop
from rewardsr.train import recipe as recipes
from rewardsr.train.checkpoint import State
from rewardsr.train.compiled import compile_networks
from rewardsr.train.graphs import recorded_bytes, use_graphs
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import Setup
from rewardsr.trainers.base import Method
from rewardsr.trainers.gdpo import GDPO, GDPOOptions
from rewardsr.trainers.rfsr import RFSR, RFSROptions

SCALE = 4
_SEEDS = itertools.count()
FORMS = {"gdpo": ("paper", "conditional", "shared"), "rfsr": ("whole", "early", "late")}


def common_arguments(parser: ArgumentParser) -> None:
    """What every benchmark of a step can be told."""
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--trainer", choices=list(FORMS), default="gdpo")
    parser.add_argument("--adapter", choices=["osediff", "seesr"], default="osediff")
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--crop", type=int, help="HQ pixels a side; default 512, middle: 128, tiny: 64")
    parser.add_argument("--rewards", help="comma-separated; psnr,detail, for rfsr detail; pyiqa's need their weights")
    parser.add_argument("--rollout", choices=["denoise", "none"], default="denoise", help="rfsr; none: as released")
    parser.add_argument("--sampler-steps", type=int, default=50, help="of seesr")
    parser.add_argument("--fixed-prompt", action="store_true", help="one prompt for all images: encoded once, ever")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true", help="ours records its network calls and replays them")
    parser.add_argument("--output", type=Path, help="append what is printed to this file")


def complete(chosen: Namespace) -> list[str]:
    """Fill in what depends on other options; returns the forms that are usual."""
    chosen.crop = chosen.crop or CROPS[chosen.size]
    chosen.rewards = chosen.rewards or ("psnr,detail" if chosen.trainer == "gdpo" else "detail")
    if chosen.trainer == "gdpo":
        return ["paper"]
    return ["whole"] if chosen.adapter == "osediff" else ["early", "late"]


class Images:
    """Endless crops, each with a prompt of its own, as in a first epoch with one caption an image."""

    def __init__(self, crop: int, fixed_prompt: bool) -> None:
        self._crop, self._fixed = crop, fixed_prompt

    def batch(self, seed: int, indices: list[int]) -> Batch:
        """The crops of these indices."""
        hq = images(len(indices), self._crop, seed + indices[0])
        lq = torch.nn.functional.interpolate(hq, scale_factor=1 / SCALE, mode="area")
        tokens = torch.randn(len(indices), TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        prompts = tuple("a photo" if self._fixed else f"photo {index} of {seed}" for index in indices)
        return Batch(lq=lq, hq=hq, prompts=prompts, extras={"ram": tokens})

    def prefetch(self, seed: int, indices: list[int]) -> None:
        """Nothing to load."""


def precision(chosen: Namespace) -> torch.dtype:
    """What the base computes in."""
    bf16 = chosen.precision == "bf16" or (chosen.precision == "auto" and torch.device(chosen.device).type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def make_adapter(chosen: Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline that is asked for, without a LoRA: OSEDiff's for RFSR, the noise-aware one of GDPO-SR for GDPO."""
    if chosen.adapter == "osediff" and chosen.trainer == "gdpo":
        return pipeline(chosen.size, device, dtype, noise_t=250, net_t=100)
    more = {"steps": chosen.sampler_steps, "template": "{tags}"} if chosen.adapter == "seesr" else {}
    return pipeline(chosen.size, device, dtype, chosen.adapter, **more)


def prepare_adapter(adapter: Any, chosen: Namespace) -> None:
    """A LoRA, and what else the command line asks for."""
    lora.attach(adapter)
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    if chosen.compile:
        compile_networks(adapter)


def method_of(adapter: Any, chosen: Namespace, form: str) -> Method:
    """The trainer in one of its `FORMS`.

    GDPO's "shared" is the conditional one with one noise for a group. RFSR's "early" and "late" take one step of the
    sampler each, inside the windows of structure and of rewards; "whole" is a one-step pipeline's, with all terms.
    """
    names = [name for name in chosen.rewards.split(",") if name]
    rewards, weights = {name: build(name) for name in names}, dict.fromkeys(names, 1.0)
    if chosen.trainer == "gdpo":
        options = GDPOOptions(
            group_size=chosen.group,
            preference="paper" if form == "paper" else "conditional",
            shared_noise=form == "shared",
            micro_batch=chosen.micro_batch,
        )
        return GDPO(adapter, rewards, weights, options)
    own: dict[str, Any] = {"vgg": chosen.vgg, "rollout": chosen.rollout, "micro_batch": chosen.micro_batch}
    at = rfsr_step(form, len(adapter.steps))
    if form == "early":
        own |= {"structure_window": (at, at), "kl_weight": 0}
        rewards, weights = {}, {}
    elif form == "late":
        own |= {"reward_window": (at, at), "structure_weight": 0}
    return RFSR(adapter, rewards, weights, RFSROptions(text_dropout=0, **own))


def rfsr_step(form: str, steps: int) -> int:
    """Which step of the sampler RFSR takes with gradients."""
    return {"whole": 0, "early": steps // 5, "late": steps * 9 // 10}[form]


def released_of(method: Method, chosen: Namespace, second: Any) -> Released:
    """The released step that belongs to the trainer; `second` is a plain UNet, and for SeeSR also SeeSR's networks."""
    if chosen.trainer == "gdpo":
        return GDPOSR(method, second[0])
    return RFSRStep(method, *second) if chosen.adapter == "osediff" else SeeSRStep(method, *second)


def seconds_of(adapter: Any, chosen: Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """The networks that the released step holds beside the adapter's, of the same weights where they can be.

    To be taken before there is a LoRA.
    """
    if chosen.adapter == "osediff":
        return (copy.deepcopy(adapter.unet),)
    own = seesr_networks(chosen.size, device)
    for network, ours in zip(own, (adapter.unet, adapter.controlnet), strict=True):
        network.load_state_dict(ours.state_dict())
    return nn.Module.to(plain_unet(chosen.size, device), dtype=dtype).requires_grad_(False), *own


def set_up(adapter: Any, method: Method, chosen: Namespace, batch: int) -> Setup:
    """Everything that the loop's step needs; each with a seed, and so with prompts, of its own."""
    content: dict[str, Any] = {
        "base": "random",
        "output": "nowhere",
        "data": {"train": "random", "crop": chosen.crop},
        "trainer": chosen.trainer,
        "rewards": [{"name": name} for name in chosen.rewards.split(",")],
        "trainer_options": method.options.model_dump(),
        "steps": 1_000_000,
        "seed": next(_SEEDS),
        "batch_size": batch,
        "gradient_checkpointing": chosen.gradient_checkpointing,
    }
    if chosen.cuda_graphs:
        use_graphs(adapter, method.trained_weights().values())
    return Setup(
        recipe=parse(recipes.Recipe, content, "benchmark"),
        accelerator=Accelerator(cpu=torch.device(chosen.device).type == "cpu"),
        adapter=adapter,
        method=method,
        data=Images(chosen.crop, chosen.fixed_prompt),  # type: ignore[arg-type]
        validation=None,
        metrics=method.rewards,
        notes=(),
    )


class Ours:
    """The real training of a set-up, step by step; the first step makes the optimiser's moments."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._state = setup, State()
        self._optimiser = make_optimiser(setup)

    def step(self) -> None:
        """The run's next step."""
        loop.step(self._setup, self._optimiser, self._state)

    def holds(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from weights(self._setup.adapter)
        yield from moments(self._optimiser)

    def recorded(self) -> int:
        """Bytes of CUDA graphs."""
        return recorded_bytes(self._setup.adapter)


class Theirs:
    """Training with a released step, on the same images and with as much around it as needs be.

    Args:
        setup: of our run; its weights are trained, by an optimiser of their own.
        released: the step.
    """

    def __init__(self, setup: Setup, released: Released) -> None:
        self._setup, self._released, self._taken = setup, released, 0
        self._optimiser = torch.optim.AdamW(released.trained, lr=setup.recipe.optimiser.learning_rate)

    def step(self) -> None:
        """The next step."""
        size, device = self._setup.recipe.batch_size, self._setup.accelerator.device
        indices = [self._taken * size + place for place in range(size)]
        batch = self._setup.data.batch(self._setup.recipe.seed, indices).to(device)
        sources = (Draws(0, self._taken, list(range(size)), stream) for stream in ("group", "update-0"))
        with torch.compiler.set_stance("force_eager"):  # `--compile` is for our step
            loss = self._released.step(batch, *sources)
        torch.nn.utils.clip_grad_norm_(self._released.trained, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._released.after_update()
        self._taken += 1
        assert loss.isfinite()

    def holds(self) -> Iterator[Tensor]:
        """What stays between steps."""
        yield from weights(self._setup.adapter)
        yield from self._released.holds()
        yield from moments(self._optimiser)

    def recorded(self) -> int:
        """It has none."""
        return 0


def weights(adapter: Any) -> Iterator[Tensor]:
    """Of all networks of a pipeline."""
    for network in (*adapter.networks.values(), adapter._text_encoder):
        yield from network.parameters()


def moments(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What an optimiser remembers."""
    for state in optimiser.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
