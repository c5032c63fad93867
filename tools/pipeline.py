"""The parts of the embedded pipeline, and how it is written.

    python -m tools.pipeline --start PIPELINE --unet DIR --vae DIR --out PIPELINE

puts other networks into a pipeline: the denoiser that `rewardsr export --format merged` makes of the run of
`examples/naosd_embedded.yaml`, or an autoencoder of `tools.autoencoder`.
"""

import argparse
import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewardsr.testing.networks import write_tokenizer

LATENT_STD = 3.0  # against noise of 1: more is more faithful and less diverse
PROMPTS = (
    "", "a photo", "a person", "stone", "grass", "a machine", "text", "sharp, clean", "high quality", "fine detail",
)  # fmt: skip


def build(vae: AutoencoderDC, seed: int) -> dict[str, Any]:
    """The parts of the pipeline by name: this autoencoder, and all others new."""
    torch.manual_seed(seed)
    vae.register_to_config(scaling_factor=LATENT_STD)
    unet = UNet2DConditionModel(
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder.requires_grad_(False).eval()
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", clip_sample=False
    )
    return {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write the pipeline in float16 beside `folder`, then swap it in: readers never see half of it."""
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("vae", "unet", "text_encoder"):
        copy.deepcopy(parts[name]).half().save_pretrained(fresh / name)
    # transformers 5 writes one file of its own; the two older ones beside it are what version 4 reads.
    write_tokenizer(fresh / "tokenizer").save_pretrained(fresh / "tokenizer")
    parts["scheduler"].save_pretrained(fresh / "scheduler")
    index: dict[str, str | list[str]] = {"_class_name": "DiffusionPipeline"}
    for name, part in sorted(parts.items()):
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(part).__name__]
    (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # they are written readable by their owner alone
    for path in fresh.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
        path.write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """The parts of a saved pipeline by name, in float32 and frozen."""
    parts: dict[str, Any] = {
        "vae": AutoencoderDC.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32),
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
    }
    for network in parts.values():
        network.requires_grad_(False).eval()
    return parts | {
        "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        "scheduler": DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
    }


@torch.no_grad()
def prompts(parts: dict[str, Any]) -> Tensor:
    """Text states of `PROMPTS`, one of which is drawn for every image: the text is not to matter."""
    ids = parts["tokenizer"](list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    states: Tensor = parts["text_encoder"](ids)[0]
    return states


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    parts = load(given.start)
    if given.unet is not None:
        parts["unet"] = UNet2DConditionModel.from_pretrained(given.unet)
    if given.vae is not None:
        parts["vae"] = AutoencoderDC.from_pretrained(given.vae)
        parts["vae"].register_to_config(scaling_factor=LATENT_STD)
    save(parts, given.out)
