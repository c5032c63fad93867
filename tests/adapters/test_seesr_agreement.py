"""Agreement of the SeeSR adapter with vectors measured on SeeSR."""

import json
from dataclasses import replace

import pytest
import torch
from _support import picked

from rewardsr import Batch, load_adapter
from rewardsr.adapters.seesr import SeeSR, add_image_attentions
from rewardsr.draws import Replay
from rewardsr.tiling import Tiling


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str, record) -> None:
    assert ours.shape == theirs.shape, what
    error = float((ours - theirs).abs().max())
    record(f"{what} ({tolerance:g})", f"{error:.2e}")
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:g}"


@pytest.fixture(scope="module")
def folder(data) -> str:
    return str(data / "tiny_seesr")


def image(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_forward(scale, folder, golden, data, record_property) -> None:
    v = golden("seesr_forward")
    t = torch.full((2,), json.loads((data / "seesr_forward.json").read_text())["timestep"])
    adapter = load_adapter("seesr", folder, scale=1, conditioning_scale=scale)
    condition = replace(
        adapter.encode(Batch(v["controlnet_cond"], extras={"ram": v["image_encoder_hidden_states"]})),
        text=v["encoder_hidden_states"],
    )
    adapter.controlnet.image_tokens = v["image_encoder_hidden_states"]
    down, middle = adapter.controlnet(
        v["latents"], t, v["encoder_hidden_states"], v["controlnet_cond"], scale, return_dict=False
    )
    suffix = "" if scale == 1 else ".scale0.7"
    name = "mid_res" if scale == 1 else "scale0.7.mid_res"
    close(*picked(middle, v, name), 5e-5, "residual of the middle", record_property)
    if scale == 1:
        for index, residual in enumerate(down):
            close(*picked(residual, v, f"down_res.{index}"), 5e-5, f"residual {index}", record_property)
    eps = adapter.predict(v["latents"], t, condition)
    close(*picked(eps, v, f"noise_pred{suffix}"), 2e-5, "prediction", record_property)
    assert float((eps - v["noise_pred.no_controlnet"]).abs().max()) > 0.01
    assert float((eps - v["noise_pred.base_sd_unet"]).abs().max()) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lr", "noise"])
def test_pipeline_step_by_step(variant, folder, golden, data, record_property, monkeypatch) -> None:
    v, about = golden("seesr_pipeline"), json.loads((data / "seesr_pipeline.json").read_text())
    start = "lq" if variant == "lr" else "noise"
    adapter = load_adapter("seesr", folder, scale=1, steps=4, start_point=start)
    assert list(adapter.steps) == about["variants"][variant]["timesteps"]
    defaults = SeeSR.Options()
    assert about["negative_prompt"] == defaults.negative_prompt
    assert about["prompt"] == defaults.template.replace("{tags}", "bird, tree")
    batch = Batch(image(v[f"{variant}.lq_uint8_hwc"]), prompts=("bird, tree",), extras={"ram": v[f"{variant}.ram"]})
    posterior = [v["lr.noise.vae_encode"][:1]] if variant == "lr" else []
    noise = [v[f"{variant}.noise.init"], *(v[f"{variant}.noise.step{k}"] for k in range(3))]
    condition = adapter.encode(batch, generator=Replay(posterior))
    texts = torch.cat([condition.negative, condition.text])
    close(*picked(texts, v, "prompt_embeds_neg_pos"), 1e-5, "texts", record_property)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    transition = adapter.transition

    def watch(z, prediction, *times):
        seen.append((z, prediction))
        return transition(z, prediction, *times)

    monkeypatch.setattr(adapter, "transition", watch)
    replay = Replay(noise)
    latents = adapter.sample_latents(condition, replay)
    assert replay.left == 0 and len(seen) == 4
    for index, (z, eps) in enumerate(seen):
        close(*picked(z, v, f"{variant}.latents_in.{index}"), 5e-4, f"latents before step {index}", record_property)
        guided = picked(eps, v, f"{variant}.noise_pred_guided.{index}")
        close(*guided, 5e-4, f"guided prediction {index}", record_property)
    close(*picked(latents, v, f"{variant}.latents_out"), 5e-4, "latents", record_property)
    close(*picked(adapter.decode(latents, condition), v, f"{variant}.image"), 5e-5, "image", record_property)


@pytest.mark.parametrize("kind", ["unet", "controlnet"])
def test_names_and_sizes_of_the_released_networks(kind, data) -> None:
    """At the size of Stable Diffusion 2, without storage: what the released files hold, key by key."""
    import diffusers
    from accelerate import init_empty_weights

    v = json.loads((data / "seesr_keys.json").read_text())
    settings = {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),  # heads, in spite of the name
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    with init_empty_weights():
        if kind == "unet":
            network = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **settings)
        else:
            network = diffusers.ControlNetModel(**settings)
        plain = set(network.state_dict())
        add_image_attentions(network, 512)
    state = network.state_dict()
    counts = v[f"sd2_{kind}_counts"]
    assert (len(plain), len(state)) == (counts["plain_tensors"], counts["total_tensors"])
    modules = v[f"sd2_{kind}_image_attention_modules"]
    assert set(state) - plain == {f"{module}.{suffix}" for module in modules for suffix in v["suffixes_per_module"]}
    added = sum(value.numel() for name, value in state.items() if name not in plain)
    assert round(added / 1e6, 1) == {"unet": 260.8, "controlnet": 124.8}[kind]


def test_tile_weights(golden, record_property) -> None:
    v = golden("seesr_pipeline")["gauss_weights_96_row_col"]
    released = Tiling(96, 32, off_centre=True)._weights(96)
    close(released[48], v[0].double(), 1e-5, "tile weights along a row", record_property)
    close(released[:, 48], v[1].double(), 1e-5, "tile weights along a column", record_property)
    ours = Tiling(96, 32)._weights(96)
    assert torch.allclose(ours, ours.flip(0)) and torch.allclose(ours, ours.T)
    assert not torch.allclose(released, released.flip(0))
