"""Loads every exported form with the library that it is meant for, in a process of its own; knows nothing of rewardsr.

python tests/consumers.py FOLDER: reads FOLDER/base (the parts of a pipeline), FOLDER/input.safetensors and the exports
beside them, and writes FOLDER/outputs.safetensors.
"""

import sys
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(sys.argv[1])
GIVEN = load_file(ROOT / "input.safetensors")


def unet(folder: Path = ROOT / "base" / "unet") -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def run(network) -> Tensor:
    return network(GIVEN["z"], 100, GIVEN["text"]).sample


def pipeline() -> diffusers.StableDiffusionPipeline:
    base = ROOT / "base"
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=unet(),
        scheduler=diffusers.DDPMScheduler.from_pretrained(base / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def by_diffusers(folder: str, name: str) -> Tensor:
    pipe = pipeline()
    pipe.load_lora_weights(str(ROOT / folder), weight_name=name)
    return run(pipe.unet)


def scaled(weight: float) -> Tensor:
    pipe = pipeline()
    pipe.load_lora_weights(
        str(ROOT / "diffusers"), weight_name="pytorch_lora_weights.safetensors", adapter_name="tuned"
    )
    pipe.set_adapters(["tuned"], [weight])
    return run(pipe.unet)


def by_peft() -> Tensor:
    return run(PeftModel.from_pretrained(unet(), str(ROOT / "peft" / "unet")))


def by_comfyui() -> Tensor:
    """ComfyUI's documented rules: `lora_unet_` and the module's diffusers name, flat; W + alpha / rank * up down."""
    network = unet()
    state, lora = network.state_dict(), load_file(ROOT / "kohya" / "lora.safetensors")
    names = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in state if key.endswith(".weight")
    }
    used = set()
    for flat, key in names.items():
        if f"{flat}.lora_up.weight" in lora:
            up, down = lora[f"{flat}.lora_up.weight"], lora[f"{flat}.lora_down.weight"]
            alpha = float(lora[f"{flat}.alpha"]) / down.shape[0]
            state[key] += alpha * (up.flatten(1) @ down.flatten(1)).reshape(state[key].shape)
            used |= {f"{flat}.lora_up.weight", f"{flat}.lora_down.weight", f"{flat}.alpha"}
    assert used == lora.keys(), sorted(lora.keys() - used)[:3]
    network.load_state_dict(state)
    return run(network)


def by_osediff() -> Tensor:
    """The rules of OSEDiff's repository: three adapters of one rank, alpha left at peft's default, conv_in in full."""
    network = unet(ROOT / "plain" / "unet")
    content = torch.load(ROOT / "osediff" / "osediff.pkl", weights_only=True)
    adapters = ("encoder", "decoder", "others")
    for name in adapters:
        config = LoraConfig(
            r=content["rank_unet"], init_lora_weights="gaussian", target_modules=content[f"unet_lora_{name}_modules"]
        )
        network.add_adapter(config, adapter_name=f"default_{name}")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora" in name or "conv_in" in name:
                parameter.copy_(content["state_dict_unet"][name])
    network.set_adapter([f"default_{name}" for name in adapters])
    return run(network)


save_file(
    {
        "base": run(unet()),
        "diffusers": by_diffusers("diffusers", "pytorch_lora_weights.safetensors"),
        "kohya in diffusers": by_diffusers("kohya", "lora.safetensors"),
        "half": scaled(0.5),
        "none": scaled(0.0),
        "peft": by_peft(),
        "kohya in ComfyUI": by_comfyui(),
        "osediff": by_osediff(),
        "merged": run(unet(ROOT / "merged" / "unet")),
    },
    ROOT / "outputs.safetensors",
)
