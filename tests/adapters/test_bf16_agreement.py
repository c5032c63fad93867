"""In bf16, without autocast: how far from the originals' float32 vectors, in shares of their size."""

import json
from pathlib import Path

import pytest
import torch
from _support import picked

from rewardsr import load_adapter, lora
from rewardsr.draws import Replay

# A weight or a value in bf16 is off by up to 0.4 %; what autocast kept in float32 on the way made these no smaller.
TOLERANCE = {"latent": 0.01, "model_pred": 0.02, "image_raw": 0.02}


def share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_osediff(tiny, data, golden, record_property) -> None:
    v = golden("osediff_small")
    prompt = json.loads((data / "osediff_small.json").read_text())["prompt"]
    adapter = load_adapter("osediff", Path(tiny), weights=data / "osediff.pkl", scale=1, dtype=torch.bfloat16)
    with torch.no_grad():
        condition = adapter.encode((v["lr_u8"] / 255), [prompt], generator=Replay([v["posterior_eps"]]))
        eps = adapter.predict(v["sample.latent"], 999, condition)
        image = adapter.to_image(v["sample.x_denoised"]) * 2 - 1
    found = {"latent": condition.latents, "model_pred": eps, "image_raw": image}
    for name, tolerance in TOLERANCE.items():
        error = share(*picked(found[name], v, f"sample.{name}"))
        record_property(f"{name} ({tolerance:g})", f"{error:.2e}")
        assert error <= tolerance, name


def test_gdpo_policy_and_reference(tiny, data, golden, record_property) -> None:
    """The policy's LoRA is rounded on its way, the reference's is off; what tells them apart is what trains."""
    v = golden("gdpo_forward")
    prompts = json.loads((data / "gdpo_reference.json").read_text())["prompts"]
    adapter = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=1, dtype=torch.bfloat16)
    lora.load(adapter, data / "gdpo_model.pkl")
    z_t = v["mode.unet_in"]
    with torch.no_grad():
        condition = adapter.encode((v["images"] + 1) / 2, [prompts[row] for row in v["prompt_row"]])
        policy = adapter.predict(z_t, 100, condition)
        with lora.reference(adapter):
            reference = adapter.predict(z_t, 100, condition)
    theirs, theirs_reference = v["mode.model_pred"], v["mode.ref_model_pred"]
    for name, ours, other, tolerance in (
        ("policy", policy, theirs, 0.02),
        ("reference", reference, theirs_reference, 0.02),
        ("difference", policy - reference, theirs - theirs_reference, 0.05),
    ):
        error = share(ours, other)
        record_property(f"{name} ({tolerance:g})", f"{error:.2e}")
        print(name, error)
        assert error <= tolerance, name
