"""In bf16, without autocast: how far from the originals' float32 vectors, in shares of their size."""

import json
from pathlib import Path

import torch
from _support import picked

from rewardsr import load_adapter, lora
from rewardsr.draws import Replay

# A weight or a value in bf16 is off by up to 0.4 %. Under the CPU's autocast these come out the same.
TOLERANCE = {"latent": 0.02, "model_pred": 0.02, "image_raw": 0.02}


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
    found = []
    for dtype in (torch.bfloat16, torch.float32):  # the latter agrees with the original to 1e-5
        adapter = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=1, dtype=dtype)
        lora.load(adapter, data / "gdpo_model.pkl")
        with torch.no_grad():
            condition = adapter.encode((v["images"] + 1) / 2, [prompts[row] for row in v["prompt_row"]])
            z_t = found[0][0] if found else adapter.schedule.add_noise(condition.latents, v["sample.noise"], 250)
            policy = adapter.predict(z_t, 100, condition)
            with lora.reference(adapter):
                reference = adapter.predict(z_t, 100, condition)
        found.append((z_t, policy, reference, policy - reference))
    for name, ours, theirs, tolerance in zip(
        ("policy", "reference", "difference"), found[0][1:], found[1][1:], (0.03, 0.03, 0.06), strict=True
    ):
        error = share(ours, theirs)
        record_property(f"{name} ({tolerance:g})", f"{error:.2e}")
        assert error <= tolerance, f"{name}: {error:.2e}"
