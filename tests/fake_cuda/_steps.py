"""Real steps on the fake device: every adapter with random weights of a size, every trainer, and upscaling."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from _fake import CUDA, FakeCuda, fake_cuda
from _records import ROOT, Cost, Event
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

sys.path.append(str(ROOT / "tests" / "benchmarks"))

from _sizes import SIZES, _Tokenizer, images

from rewardsr import lora
from rewardsr.adapters import stable_diffusion as family
from rewardsr.adapters.osediff import OSEDiff
from rewardsr.adapters.sd_upscaler import SDUpscaler
from rewardsr.adapters.seesr import EMBEDDING, SeeSR, add_image_attentions
from rewardsr.adapters.stablesr import StableSR
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.lora import targets
from rewardsr.options import parse
from rewardsr.rewards import build, lpips, vgg
from rewardsr.train import loop
from rewardsr.train import recipe as recipes
from rewardsr.train.checkpoint import State
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import Setup, method_class
from rewardsr.trainers import naosd, rfsr

ADAPTERS = ("osediff", "seesr", "stablesr", "sd_upscaler")
SCALE = 4
TOKENS, WIDTH = 145, 512  # of SeeSR's image embeddings
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LOW_RES = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}

# What differs from SD 2.1's networks in the x4 upscaler, and the sizes of StableSR's additions.
_UPSCALER: dict[str, dict[str, Any]] = {
    "sd21": {
        "unet": {
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            "block_out_channels": (256, 512, 512, 1024),
            "attention_head_dim": 8,
            "only_cross_attention": (True, True, True, False),
        },
        "vae": {"block_out_channels": (128, 256, 512), "sample_size": 256},
    },
    "tiny": {"unet": {}, "vae": {"block_out_channels": (16, 16, 32)}},
}
_STABLESR: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "sd21": ({"features": 256, "hidden": 128}, {}),
    "tiny": (
        {"features": 8, "hidden": 8},
        {
            "out_channels": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "attention": (True, False),
            "heads": 2,
            "norm_num_groups": 4,
        },
    ),
}
_CONTROLNET = ("down_block_types", "block_out_channels", "layers_per_block", "attention_head_dim")
_CONTROLNET += ("cross_attention_dim", "use_linear_projection", "norm_num_groups")


@dataclass(frozen=True)
class Case:
    """A step, or an image to upscale (`trainer` "upscale").

    Attributes:
        label: of the row.
        options: of the trainer; of the adapter where it upscales.
        sampler: steps of the pipelines that take many.
        side: of HQ in pixels.
        fixed_prompt: whether the prompt is the same in every step.
        rewards: by name, each with weight 1.
    """

    adapter: str
    trainer: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: str = "tiny"
    batch: int = 1
    side: int = 64
    sampler: int = 2
    checkpointing: bool = False
    fixed_prompt: bool = False
    rewards: tuple[str, ...] = ("psnr", "detail")
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """What a case took: in all, by part, its copies and waits, and the bytes that were there before it."""

    total: Cost
    parts: dict[str, Cost]
    events: list[Event]
    resident: int

    @property
    def copies(self) -> int:
        """Tensors that travelled between host and device."""
        return sum(event.copies for event in self.events)

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return sum(event.waits for event in self.events)


def measure(case: Case) -> Measured:
    """A step when the optimiser has its state, and an image; with `fixed_prompt` the second of two."""
    with fake_cuda() as device, TemporaryDirectory() as folder:
        work, watched = (_upscaling if case.trainer == "upscale" else _training)(device, case, Path(folder))
        if case.fixed_prompt:
            work()
        device.reset()
        resident = device.allocated
        with watched:
            work()
        return Measured(device.total, device.costs, device.events, resident)


# ---- what is measured ----


class _Engine(Accelerator):
    """accelerate, which finds no card."""

    device = CUDA


class _Images:
    """Endless crops, each with a prompt of its own unless there is one for all."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def batch(self, seed: int, indices: list[int]) -> Batch:
        """The crops of these indices."""
        hq = images(len(indices), self._case.side, indices[0])
        lq = torch.nn.functional.interpolate(hq, scale_factor=1 / SCALE, mode="area")
        prompts = tuple("a photo" if self._case.fixed_prompt else f"photo {index}" for index in indices)
        extras = {EMBEDDING: torch.zeros(len(indices), TOKENS, WIDTH)} if self._case.adapter == "seesr" else {}
        return Batch(lq=lq, hq=hq, prompts=prompts, extras=extras)

    def prefetch(self, seed: int, indices: list[int]) -> None:
        """Nothing to load."""


def _training(device: FakeCuda, case: Case, folder: Path) -> tuple[Callable[[], Any], Any]:
    kind, options = method_class(case.trainer), dict(case.options)
    if case.trainer == "rfsr" and options.get("kl_weight") != 0:
        options["vgg"] = _write_vgg(folder / "vgg.safetensors", case.size, vgg.GROUPS)
    if case.trainer == "naosd":
        options["vgg"] = _write_vgg(folder / "vgg.safetensors", case.size, lpips.GROUPS)
        options["lpips"] = _write_heads(folder / "heads.safetensors", case.size)
    given = parse(kind.Options, options, "options")
    # Quantised weights are told by their type, which here is that of all weights.
    with device.weights(), mock.patch.object(targets, "Tensor", FakeTensor):
        adapter = make_adapter(case)
        if sits_on := kind.lora_targets(adapter, given):
            lora.attach(adapter, targets=sits_on)
        if case.checkpointing:
            adapter.enable_gradient_checkpointing()
        rewards = {name: build(name) for name in case.rewards} if kind.rewarded else {}
        with mock.patch.object(rfsr, "VGG19", _read(vgg.VGG19)), mock.patch.object(lpips, "LPIPS", _read(lpips.LPIPS)):
            method: Any = kind(adapter, rewards, dict.fromkeys(rewards, 1.0), given)
        content = {
            "base": "random",
            "output": "nowhere",
            "data": {"train": "random", "crop": case.side},
            "rewards": [{"name": name} for name in rewards],
            "trainer": case.trainer,
            "trainer_options": options,
            "steps": 1_000_000,
            "batch_size": case.batch,
            "gradient_checkpointing": case.checkpointing,
        }
        setup = Setup(
            recipe=parse(recipes.Recipe, content, "case"),
            accelerator=_Engine(cpu=True),
            adapter=adapter,
            method=method,
            data=_Images(case),  # type: ignore[arg-type]
            validation=None,
            metrics=method.rewards,
            notes=(),
        )
        optimiser, state = make_optimiser(setup), State()
        for parameter in method.trained_weights().values():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return lambda: loop.step(setup, optimiser, state), watched(device, adapter, method, optimiser)


def _upscaling(device: FakeCuda, case: Case, folder: Path) -> tuple[Callable[[], Any], Any]:
    with device.weights():
        adapter = make_adapter(case)
    data, count = _Images(case), iter(range(2))

    def work() -> None:
        index = next(count)
        batch = data.batch(0, [index])
        upscale_tensor(adapter, Batch(batch.lq, prompts=batch.prompts, extras=batch.extras), generator=Draws(0, 0, [0]))

    return work, watched(device, adapter)


# ---- networks ----


def make_adapter(case: Case) -> Any:
    """A pipeline of random weights, as its `load` and `to` would leave it on CUDA."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from rewardsr.adapters._sft import StructEncoder, add_modulation

    upscaler = case.adapter == "sd_upscaler"
    changed = _UPSCALER[case.size] if upscaler else {"unet": {}, "vae": {}}
    config = {part: SIZES[case.size][part] | changed.get(part, {}) for part in ("unet", "vae", "text_encoder")}
    if upscaler:
        levels = len(config["vae"]["block_out_channels"])
        config["unet"] |= {"in_channels": 7, "num_class_embeds": 1000}
        for direction in ("down", "up"):
            name = f"{direction}_block_types"
            config["vae"][name] = config["vae"][name][:levels]
    own: dict[str, Any] = dict(case.options) if case.trainer == "upscale" else {}
    more: list[Any] = []
    with torch.device(CUDA):
        unet = diffusers.UNet2DConditionModel(**config["unet"])
        if case.adapter == "seesr":
            # The ControlNet is made like the UNet's first half.
            alike = {name: value for name, value in config["unet"].items() if name in _CONTROLNET}
            more.append(diffusers.ControlNetModel(**alike))
            for network in (unet, *more):
                add_image_attentions(network, WIDTH)
        elif case.adapter == "stablesr":
            modulation, encoder = _STABLESR[case.size]
            add_modulation(unet, **modulation)
            more.append(StructEncoder(**encoder))
        elif upscaler:
            more += [LOW_RES, 350]
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        vae = diffusers.AutoencoderKL(**config["vae"])
    kind = {"osediff": OSEDiff, "seesr": SeeSR, "stablesr": StableSR, "sd_upscaler": SDUpscaler}[case.adapter]
    own |= {"noise_t": 250, "net_t": 100} if case.adapter == "osediff" else {"steps": case.sampler}
    parts = family.Parts(unet, vae, text.to("cpu"), _Tokenizer(text.config.vocab_size), BETAS, "random")
    with mock.patch.object(family, "fingerprint", lambda parts: "none"):
        adapter: Any = kind(parts, "random", kind.Options(**own), *more)
    return adapter.to(torch.device("cuda"), case.dtype)


def _widths(size: str) -> tuple[int, ...]:
    return (64, 128, 256, 512, 512) if size == "sd21" else (4,) * 5


def _write_vgg(path: Path, size: str, groups: tuple[int, ...]) -> str:
    """A file of zeros like torchvision's weights of a VGG: of the real width, or a narrow one."""
    tensors: dict[str, Tensor] = {}
    place, before = 0, 3
    for width, count in zip(_widths(size), groups, strict=True):
        for _ in range(count):
            tensors[f"features.{place}.weight"] = torch.zeros(width, before, 3, 3)
            tensors[f"features.{place}.bias"] = torch.zeros(width)
            place, before = place + 2, width  # a ReLU follows
        place += 1  # and a pooling
    save_file(tensors, path)
    return str(path)


def _write_heads(path: Path, size: str) -> str:
    """The same for LPIPS's own weights."""
    save_file({f"lin{n}.model.1.weight": torch.zeros(1, w, 1, 1) for n, w in enumerate(_widths(size))}, path)
    return str(path)


def _read(kind: type[torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """A network of weights from files, which are read as on any machine."""

    def made(*files: str) -> torch.nn.Module:
        with no_dispatch():
            return kind(*files)

    return made


# ---- parts ----


@contextmanager
def watched(device: FakeCuda, adapter: Any, method: Any = None, optimiser: Any = None) -> Iterator[None]:
    """Inside, everything that the parts of a step do is counted for them."""
    state = {"preparing": False, "encoding": False}

    def within(name: Callable[[], str], function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with device.part(name()):
                return function(*arguments, **options)

        return call

    def flagged(flag: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            state[flag] = True
            try:
                return function(*arguments, **options)
            finally:
                state[flag] = False

        return call

    def prediction() -> str:
        if method is None or state["preparing"]:
            return "sampling"
        on = lora.active(adapter)
        return "fake score" if on == [naosd.FAKE] else "policy forward" if on else "reference"

    def latents() -> str:
        return "LQ encode" if state["encoding"] else "re-encode"

    def part(name: str | Callable[[], str]) -> Callable[[Any], Any]:
        return lambda function: within(name if callable(name) else lambda: name, function)

    changes: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (adapter, "_text", part("text")),
        (adapter, "_encode", lambda function: flagged("encoding", function)),
        (adapter, "_to_latents", part(latents)),
        (adapter, "_to_image", part("decode")),
        (adapter, "_predict", part(prediction)),
    ]
    if method is not None:
        judges = [*method.rewards.values(), getattr(method, "_vgg", None), getattr(method, "_lpips", None)]
        changes += [(kind, "__call__", part("rewards")) for kind in {type(judge) for judge in judges if judge}]
        changes += [
            (method, "prepare", lambda function: flagged("preparing", function)),
            (method, "after_update", part("optimiser")),
            (optimiser, "step", part("optimiser")),
            (Tensor, "backward", part("policy backward")),
            (torch.autograd, "grad", part("policy backward")),
        ]
    with ExitStack() as stack:
        for owner, name, change in changes:
            stack.enter_context(mock.patch.object(owner, name, change(getattr(owner, name))))
        yield
