"""Agreement of the one-step adapter with vectors measured on OSEDiff and GDPO-SR."""

import json
from pathlib import Path

import pytest
import torch
from _support import picked

from rewardsr import load_adapter, lora
from rewardsr.draws import Replay

GDPO = {"noise_t": 250, "net_t": 100, "scale": 1}


def unit(image: torch.Tensor) -> torch.Tensor:
    return (image + 1) / 2


def from_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """The image in [0, 1], as exactly as the originals' arithmetic leaves it."""
    return unit(pixels / 255 * 2 - 1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str, record) -> None:
    error = float((ours - theirs).abs().max())
    record(f"{what} ({tolerance:g})", f"{error:.2e}")
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:g}"


@pytest.mark.parametrize("variant", ["sample", "mode"])
def test_osediff_from_the_released_checkpoint(variant, tiny, data, golden, record_property) -> None:
    v = golden("osediff_small")
    prompt = json.loads((data / "osediff_small.json").read_text())["prompt"]
    adapter = load_adapter("osediff", Path(tiny), weights=data / "osediff.pkl", scale=1)  # text does as well
    noise = Replay([v["posterior_eps"]]) if variant == "sample" else None
    with torch.no_grad():
        condition = adapter.encode(from_bytes(v["lr_u8"]), [prompt], generator=noise)
        eps = adapter.predict(condition.latents, 999, condition)
        z0 = adapter.schedule.x0(condition.latents, eps, 999)
        image = adapter.to_image(z0)
        assert torch.equal(adapter.sample(condition), image.clamp(0, 1))
    close(*picked(condition.text, v, "prompt_embeds"), 5e-6, "text", record_property)
    close(*picked(condition.latents, v, f"{variant}.latent"), 5e-5, "latent", record_property)
    close(*picked(eps, v, f"{variant}.model_pred"), 1e-5, "model_pred", record_property)
    close(*picked(z0, v, f"{variant}.x_denoised"), 3e-4, "x_denoised", record_property)
    close(*picked(image * 2 - 1, v, f"{variant}.image_raw"), 2e-5, "image", record_property)
    if variant == "sample":
        levels = (image.clamp(0, 1)[0] * 255).to(torch.uint8).permute(1, 2, 0)  # the original truncates
        ours, theirs = picked(levels, v, "sample.image_u8_hwc")
        close(ours.int(), theirs.int(), 1, "8 bit", record_property)


def test_tiles(tiny, data, golden, record_property) -> None:
    """OSEDiff's tiles of 16 with 4 overlap on latents of 24 x 20, its weights half a pixel too low."""
    v = golden("osediff_tiled")
    options = {"weights": data / "osediff.pkl", "scale": 1, "tile": 16, "tile_overlap": 4}
    adapter = load_adapter("osediff", tiny, **options, tile_weights="original")
    centred = load_adapter("osediff", tiny, **options)
    height, width = v["latent"].shape[-2] * 4, v["latent"].shape[-1] * 4
    with torch.no_grad():
        condition = adapter.encode(torch.zeros(1, 3, height, width), ["clean, high-resolution, 8k"])
        ours = centred._stitched(v["latent"], 999, condition)
        eps = adapter._stitched(v["latent"], 999, condition)
        z0 = adapter.schedule.x0(v["latent"], eps, 999)
        adapter.tiling = None
        whole = adapter._stitched(v["latent"], 999, condition)
    close(*picked(eps, v, "model_pred"), 1e-5, "tiled model_pred", record_property)
    close(*picked(z0, v, "x_denoised"), 3e-4, "tiled x_denoised", record_property)
    close(*picked(whole, v, "untiled.model_pred"), 1e-5, "untiled model_pred", record_property)
    assert float((ours - eps).abs().max()) > 1e-3, "centred weights are other weights"


def test_the_checkpoint_matters(tiny, golden, record_property) -> None:
    v = golden("osediff_small")
    adapter = load_adapter("osediff", tiny, scale=1)
    with torch.no_grad():
        condition = adapter.encode(
            from_bytes(v["lr_u8"]), ["clean, high-resolution, 8k"], generator=Replay([v["posterior_eps"]])
        )
        # The stored prediction without LoRA was made on the LoRA-encoded latents.
        eps = adapter.predict(v["sample.latent"], 999, condition)
    assert float((eps - v["sample.model_pred"]).abs().max()) > 0.01
    assert float((condition.latents - v["sample.latent"]).abs().max()) > 0.01


def test_gdpo_reference_group(tiny, data, golden, record_property) -> None:
    v = golden("gdpo_reference")
    prompts = json.loads((data / "gdpo_reference.json").read_text())["prompts"]
    adapter = load_adapter("osediff", tiny, **GDPO)
    with torch.no_grad():
        condition = adapter.encode(from_bytes(v["lr_u8"]), prompts, generator=Replay([v["posterior_eps"]])).repeat(6)
        z_t = adapter.start(condition, Replay([v["sample.noise"].flatten(0, 1)]))
        eps = adapter.predict(z_t, 100, condition)
        z0 = adapter.schedule.x0(z_t, eps, 100)
        images = adapter.decode(z0, condition)
    close(*picked(condition.text[::6], v, "prompt_embeds_pos"), 5e-6, "text", record_property)
    close(*picked(eps, v, "sample.model_pred"), 1e-5, "model_pred", record_property)
    close(*picked(z0, v, "sample.x_denoised"), 1e-5, "x_denoised", record_property)
    close(*picked(images * 2 - 1, v, "sample.images"), 2e-5, "images", record_property)


def test_gdpo_reference_group_in_mode(tiny, data, golden, record_property) -> None:
    v = golden("gdpo_reference")
    prompts = json.loads((data / "gdpo_reference.json").read_text())["prompts"]
    adapter = load_adapter("osediff", tiny, **GDPO)
    with torch.no_grad():
        condition = adapter.encode(from_bytes(v["lr_u8"]), prompts).repeat(6)
        z0 = adapter.sample_latents(condition, Replay([v["mode.noise"].flatten(0, 1)]))
    close(*picked(z0, v, "mode.x_denoised"), 1e-5, "x_denoised", record_property)


@pytest.mark.parametrize("variant", ["sample", "mode"])
def test_gdpo_forward_policy_and_reference(variant, tiny, data, golden, record_property) -> None:
    v = golden("gdpo_forward")
    prompts = json.loads((data / "gdpo_reference.json").read_text())["prompts"]
    adapter = load_adapter("osediff", tiny, **GDPO)
    lora.load(adapter, data / "gdpo_model.pkl")
    noise = Replay([v["posterior_eps"]]) if variant == "sample" else None
    with torch.no_grad():
        latents = adapter.to_latents(unit(v["images"]), noise)
        condition = adapter.encode(unit(v["images"]), [prompts[row] for row in v["prompt_row"]])
        z_t = adapter.schedule.add_noise(latents, v[f"{variant}.noise"], 250)
        policy = adapter.predict(z_t, 100, condition)
        with lora.reference(adapter):
            reference = adapter.predict(z_t, 100, condition)
    close(*picked(z_t, v, f"{variant}.unet_in"), 5e-5, "unet_in", record_property)
    close(*picked(policy, v, f"{variant}.model_pred"), 1e-5, "policy", record_property)
    close(*picked(reference, v, f"{variant}.ref_model_pred"), 1e-5, "reference", record_property)
    policy, partial = picked(policy, v, "only_default_others_active.model_pred")
    assert float((policy - partial).abs().max()) > 0.01


@pytest.mark.parametrize("how", ["merged on load", "loaded and merged"])
def test_gdpo_test_pipeline(how, tiny, data, golden, record_property) -> None:
    v = golden("gdpo_test")
    if how == "merged on load":
        adapter = load_adapter("osediff", tiny, weights=str(data / "gdpo_model.pkl"), **GDPO)
    else:
        adapter = load_adapter("osediff", tiny, **GDPO)
        lora.load(adapter, data / "gdpo_model.pkl")
        lora.merge(adapter)
    own = adapter.trainable["unet"].state_dict()
    close(*picked(own["conv_in.weight"], v, "merged_conv_in_weight"), 1e-6, "conv_in", record_property)
    conv1 = own["down_blocks.0.resnets.0.conv1.weight"]
    close(*picked(conv1, v, "merged_down0_conv1_weight"), 1e-6, "conv1", record_property)
    to_q = own["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    close(*picked(to_q, v, "merged_mid_to_q_weight"), 1e-6, "to_q", record_property)
    with torch.no_grad():
        condition = adapter.encode(
            from_bytes(v["lr_u8"]), ["clean, high-resolution, 8k"], generator=Replay([v["posterior_eps"]])
        )
        z_t = adapter.start(condition, Replay([v["noise"]]))
        eps = adapter.predict(z_t, 100, condition)
        image = adapter.sample(condition, Replay([v["noise"]]))
    close(*picked(z_t, v, "unet_in"), 5e-5, "unet_in", record_property)
    close(*picked(eps, v, "model_pred"), 1e-5, "model_pred", record_property)
    close(*picked(image * 2 - 1, v, "image"), 2e-5, "image", record_property)


@pytest.mark.parametrize("t", [999, 250, 100, 1])
def test_one_scheduler_step_is_x0(t, tiny, golden, record_property) -> None:
    v = golden("scheduler_step")
    schedule = load_adapter("osediff", tiny).schedule
    assert torch.equal(schedule.alphas_cumprod, v["alphas_cumprod"])
    x0 = schedule.x0(v["sample"], v["model_pred"], t)
    scale = max(1.0, float(v[f"t{t}.prev_sample"].abs().max()))
    close(*picked(x0, v, f"t{t}.prev_sample"), 1e-6 * scale, f"x0 at {t}", record_property)
    noised = schedule.add_noise(v["sample"], v["noise"], 250)
    close(*picked(noised, v, "add_noise_250"), 1e-6, "add_noise", record_property)
