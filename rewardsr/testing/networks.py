"""Tiny real pipelines and images, for tests: diffusers networks of random weights, in diffusers' folder layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewardsr.adapters._sft import StructEncoder, add_modulation
from rewardsr.adapters.stable_diffusion import PARTS
from rewardsr.data.images import write_image
from rewardsr.hub.fetch import EMBEDDED, fetch
from rewardsr.json_object import read_object

TEXT_WIDTH = 16


def tiny_pipeline(folder: Path | str, seed: int = 0, autoencoder: str = "kl", family: str = "sd") -> Path:
    """Write a pipeline with a few thousand random weights, in diffusers' folder layout.

    Args:
        folder: where to; made if need be.
        seed: of the weights.
        autoencoder: "kl" (AutoencoderKL, f=4, 4 channels) or "dc" (AutoencoderDC, f=4, without a posterior).
        family: "sd" (Stable Diffusion), "upscaler", which diffusers' StableDiffusionUpscalePipeline loads, "stablesr",
            whose folder holds StableSR's own networks as well, or "flow" (Stable Diffusion 3's transformer, which takes
            LQ latents beside the noisy ones: `rewardsr.testing.flow`).

    Returns:
        The folder.

    Raises:
        ValueError: there is no such family.
    """
    folder = Path(folder)
    components = _tiny_schedulers(family)
    # The scaling factor is made up, but for the upscaler's: diffusers knows one only, and sets it.
    scaling = {"scaling_factor": 0.08333 if family == "upscaler" else 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "flow":
            components["transformer"] = _tiny_transformer()
            scaling["shift_factor"] = 0.1
        else:
            components["unet"] = _tiny_unet(family)
        components["vae"] = _tiny_autoencoder(autoencoder, **scaling)
        components["text_encoder"] = _tiny_text_encoder()
        if family == "stablesr":
            components["struct_encoder"] = _tiny_struct_encoder(components["unet"])
    tokenizer = write_tokenizer(folder / "tokenizer")
    if family == "upscaler":  # diffusers' pipeline asks for more files: how long prompts are, and which class is what
        components["tokenizer"] = tokenizer
        parts = {part: [type(of).__module__.partition(".")[0], type(of).__name__] for part, of in components.items()}
        index = {"_class_name": "StableDiffusionUpscalePipeline", **parts}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for name, component in components.items():
        component.save_pretrained(folder / name)
    return folder


def untrained_pipeline(folder: Path | str, base: str = EMBEDDED, seed: int = 0) -> Path:
    """Write a Stable Diffusion pipeline whose UNet has random weights again, for trainings from nothing.

    Args:
        folder: where to; must not exist.
        base: whose sizes, autoencoder and text encoder it has: a diffusers folder, or "embedded".
        seed: of the weights.

    Returns:
        The folder.
    """
    source, folder = fetch(base, "base", PARTS)[0], Path(folder)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("unet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel.from_config(read_object(source / "unet" / "config.json"))
    unet.save_pretrained(folder / "unet")
    return folder


def _tiny_schedulers(family: str) -> dict[str, Any]:
    """The schedulers of a family, by the name of their folder, as its released pipelines have them."""
    if family in ("sd", "stablesr"):
        options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        # Random noise, predicted at the last times, would saturate the image; random velocity does not.
        prediction = "v_prediction" if family == "stablesr" else "epsilon"
        return {"scheduler": diffusers.DDPMScheduler(**options, prediction_type=prediction)}
    if family == "upscaler":
        options = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "clip_sample": False}
        ddim = diffusers.DDIMScheduler(
            **options, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1
        )
        return {"scheduler": ddim, "low_res_scheduler": diffusers.DDPMScheduler(**options)}
    if family == "flow":
        return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)}
    raise ValueError(f"unknown family '{family}': expected sd, upscaler, stablesr or flow")


def _tiny_unet(family: str) -> Any:
    # An upscaler's takes the LQ image beside the latents, and how noisy that is as a class.
    options = {"in_channels": 7, "num_class_embeds": 50} if family == "upscaler" else {"in_channels": 4}
    return diffusers.UNet2DConditionModel(
        **options,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )


def _tiny_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=64,
    )


def _tiny_struct_encoder(unet: Any) -> Any:
    """The encoder of a tiny StableSR; its features modulate the UNet from now on."""
    add_modulation(unet, features=8, hidden=8)
    return StructEncoder(
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention=(True, False),
        heads=2,
        norm_num_groups=4,
    )


def _tiny_autoencoder(kind: str, **scaling: float) -> Any:
    if kind == "kl":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            **scaling,
        )
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        **scaling,
    )


def _tiny_text_encoder() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
        )
    )


def write_images(folder: Path | str, count: int = 4, size: int = 48, seed: int = 0) -> Path:
    """Write PNGs with edges, gradients and texture, for tests that need a data folder; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, size)
    for index in range(count):
        turn, colours = torch.rand(2, generator=random), torch.rand(3, 1, 1, generator=random)
        waves = torch.sin(20 * (turn[0] * ramp[:, None] + turn[1] * ramp[None, :]))
        texture = 0.1 * torch.randn(3, size, size, generator=random)
        write_image((0.5 + 0.3 * colours * waves.sign() + 0.2 * ramp + texture).clamp(0, 1), folder / f"{index:03}.png")
    return folder


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells: one token a byte, one more for a byte that ends a word, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # The byte-level alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
