"""Pipelines of random weights, made in memory where they are to run: tiny, a quarter as wide as SD 2.1, and SD 2.1."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewardsr.adapters import stable_diffusion as family
from rewardsr.adapters.osediff import OSEDiff
from rewardsr.adapters.seesr import SeeSR, add_image_attentions

PARAMETERS = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}  # of SD 2.1-base
LENGTH = 77  # tokens of a prompt

_SD21: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),  # heads, in spite of the name
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 768,
    },
    "text_encoder": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
_TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 514,
        "bos_token_id": 512,
        "eos_token_id": 513,
    },
}
_MIDDLE: dict[str, dict[str, Any]] = {
    "unet": {
        **_SD21["unet"],
        "block_out_channels": (80, 160, 320, 320),
        "attention_head_dim": (2, 4, 5, 5),
        "cross_attention_dim": 256,
        "norm_num_groups": 16,
    },
    "vae": {**_SD21["vae"], "block_out_channels": (32, 64, 128, 128)},
    "text_encoder": {
        **_SD21["text_encoder"],
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
    },
}
SIZES = {"tiny": _TINY, "middle": _MIDDLE, "sd21": _SD21}
TOKENS, WIDTH = 145, 512  # of SeeSR's image embeddings
_VGG_PLACES = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)  # among torchvision's layers
_VGG_WIDTHS = (*[64] * 2, *[128] * 2, *[256] * 4, *[512] * 8)
CROPS = {"tiny": 64, "middle": 128, "sd21": 512}  # HQ pixels a side, unless another number is asked for


class _Tokenizer:
    """Token numbers without a vocabulary: what they are makes no difference to the cost."""

    model_max_length = LENGTH

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, prompts: list[str], **_: Any) -> SimpleNamespace:
        rows = [[(sum(map(ord, prompt)) + place) % self._vocabulary for place in range(LENGTH)] for prompt in prompts]
        return SimpleNamespace(input_ids=torch.tensor(rows))


def pipeline(size: str, device: torch.device, dtype: torch.dtype, adapter: str = "osediff", **options: Any) -> Any:
    """A pipeline with random weights, scale 4.

    Args:
        size: one of `SIZES`.
        device: where the networks are made, and stay.
        dtype: of the base.
        adapter: "osediff", or "seesr".
        options: of the adapter.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    config, name = SIZES[size], f"random weights of size {size}"
    unet, controlnet = seesr_networks(size, device) if adapter == "seesr" else (plain_unet(size, device), None)
    with torch.device(device):
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        parts = family.Parts(
            unet=unet,
            vae=diffusers.AutoencoderKL(**config["vae"]),
            text_encoder=text,
            tokenizer=_Tokenizer(text.config.vocab_size),
            scheduler={
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "steps_offset": 1,
            },
            revision="random",
        )
    with _unread():
        if adapter == "seesr":
            made: Any = SeeSR(parts, name, SeeSR.Options(**options), controlnet)
        else:
            made = OSEDiff(parts, name, OSEDiff.Options(**options))
    return made if device.type == "meta" else made.to(device, dtype)


def plain_unet(size: str, device: torch.device) -> Any:
    """Stable Diffusion's, float32, of random weights."""
    import diffusers

    with torch.device(device):
        return diffusers.UNet2DConditionModel(**SIZES[size]["unet"])


def seesr_networks(size: str, device: torch.device) -> tuple[Any, Any]:
    """SeeSR's UNet and ControlNet, float32, of random weights."""
    import diffusers

    unet = plain_unet(size, device)
    taken = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    config = {name: value for name, value in SIZES[size]["unet"].items() if name in taken}
    with torch.device(device):
        controlnet = diffusers.ControlNetModel(**config)
        for network in (unet, controlnet):
            add_image_attentions(network, WIDTH)
    return unet, controlnet


def vgg_file(folder: Path, size: str) -> str:
    """VGG19's convolutions in a file, of random weights; as wide as they are, but for "tiny"."""
    narrow = 16 if size == "tiny" else 1
    state, channels = {}, 3
    for place, width in zip(_VGG_PLACES, _VGG_WIDTHS, strict=True):
        out = width // narrow
        state[f"features.{place}.weight"] = torch.randn(out, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        state[f"features.{place}.bias"], channels = torch.zeros(out), out
    path = folder / "vgg19.safetensors"
    save_file(state, path)
    return str(path)


@contextmanager
def _unread() -> Iterator[None]:
    """Inside, no fingerprint is taken: nobody asks for that of random weights, and large ones take a while to read."""
    original = family.fingerprint
    family.fingerprint = lambda parts: "none"
    try:
        yield
    finally:
        family.fingerprint = original


def parameter_counts(adapter: Any) -> dict[str, int]:
    """Number of weights of each network, without a LoRA."""
    networks = {**adapter.networks, "text_encoder": adapter._text_encoder}
    return {
        name: sum(p.numel() for key, p in network.named_parameters() if "lora_" not in key)
        for name, network in networks.items()
    }


def images(count: int, side: int, seed: int) -> Tensor:
    """Smooth noise, (count, 3, side, side) in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(1, side // 8), max(1, side // 8), generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth + 0.05 * torch.randn(count, 3, side, side, generator=random)).clamp(0, 1)
