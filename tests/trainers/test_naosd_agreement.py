"""Agreement of the distillation and of the fake score's error with vectors measured on GDPO-SR's stage one."""

import json

import pytest
import torch

from rewardsr import Batch, load_adapter, lora
from rewardsr.draws import Replay
from rewardsr.trainers.distillation import vsd_gradient, vsd_loss
from rewardsr.trainers.naosd import FAKE, NAOSD, NAOSDOptions

VARIANTS = ("official_only_others", "all_three_active")


@pytest.fixture(scope="module")
def about():
    from _data import DATA

    return json.loads((DATA / "naosd_vsd.json").read_text())


@pytest.fixture(scope="module")
def method(tiny, about):
    adapter = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=1)
    (negative,) = set(about["negative_prompts"])
    options = NAOSDOptions(full="none", lpips_weight=0, vsd_guidance=about["cfg_vsd"], negative_prompt=negative)
    lora.attach(adapter, targets=NAOSD.lora_targets(adapter, options))
    return NAOSD(adapter, {}, {}, options)


@pytest.fixture
def condition(method, about):
    return method.adapter.encode(Batch(lq=torch.zeros(3, 3, 32, 32), prompts=tuple(about["prompts"])))


def become(method, data, variant: str) -> dict[str, torch.nn.Parameter]:
    """Give the fake score the recorded LoRA; as published, the middle block's part and conv_out's alone act."""
    tensors, rank, alpha = method.adapter.import_lora(str(data / "gdpo_model.pkl"))
    assert (rank, alpha) == lora.rank_and_alpha(method.adapter, FAKE)
    if variant == "official_only_others":
        others = ("unet.mid_block.", "unet.conv_out.")
        tensors = {
            name: value if name.startswith(others) else torch.zeros_like(value) for name, value in tensors.items()
        }
    lora.load_state_dict(method.adapter, tensors, name=FAKE)
    return lora.parameters(method.adapter, FAKE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_distillation_and_its_gradient(variant, method, condition, about, data, golden) -> None:
    v = golden("naosd_vsd")
    become(method, data, variant)
    z0 = v["latents"].clone().requires_grad_()
    draws = Replay([v["timesteps"] - about["min_step"], v["noise"]])
    loss = method.distillation(z0, condition, draws)
    loss.backward()
    assert draws.left == 0
    assert abs(float(loss.detach()) - about[variant]["dm_loss"]) <= 1e-5
    assert float((z0.grad - v[f"{variant}.dm.grad_latents"]).abs().max()) <= 1e-7


def test_the_maths_on_recorded_predictions(method, about, golden) -> None:
    v, schedule, variant = golden("naosd_vsd"), method.adapter.schedule, "all_three_active"
    z_t = schedule.add_noise(v["latents"], v["noise"], v["timesteps"])
    unwanted, wanted = v[f"{variant}.dm.real_pred_uncond_then_text"].chunk(2)
    real = schedule.x0(z_t, unwanted + about["cfg_vsd"] * (wanted - unwanted), v["timesteps"])
    fake = schedule.x0(z_t, v[f"{variant}.dm.fake_pred"], v["timesteps"])
    z0 = v["latents"].clone().requires_grad_()
    loss = vsd_loss(z0, real, fake)
    loss.backward()
    assert abs(float(loss.detach()) - float(v[f"{variant}.dm.loss"])) <= 1e-6
    assert float((z0.grad - v[f"{variant}.dm.grad_latents"]).abs().max()) <= 1e-8
    weight = v[f"{variant}.dm.weighting"]
    assert torch.allclose(vsd_gradient(v["latents"], real, fake) * weight, fake - real, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_error_of_the_fake_score_and_its_gradients(variant, method, condition, about, data, golden) -> None:
    v = golden("naosd_vsd")
    parameters = become(method, data, variant)
    with lora.only(method.adapter, FAKE):
        draws = Replay([v["lora_loss.timesteps"], v["lora_loss.noise"]])
        error = method.fake_error(v["latents"], condition, draws)
        gradients = dict(zip(parameters, torch.autograd.grad(error, list(parameters.values())), strict=True))
    assert abs(float(error.detach()) - about[variant]["lora_loss"]) <= 1e-5
    recorded = {
        key.removeprefix(f"grad/{variant}/"): value for key, value in v.items() if key.startswith(f"grad/{variant}/")
    }
    assert len(recorded) >= 4
    for key, theirs in recorded.items():
        module, _, rest = key.partition(".lora_")
        ours = gradients[f"unet.{module}.lora_{rest[0]}.weight"]
        assert float((ours - theirs).norm() / theirs.norm().clamp(min=1e-8)) <= 1e-4, key


def test_the_encoder_is_adapted_where_the_original_adapts_it(method, about) -> None:
    own = {name.rpartition(".lora_")[0] for name in lora.parameters(method.adapter) if name.startswith("vae.")}
    assert own == {f"vae.{name}" for name in about["naosd_modules"]["lora_vae_modules_encoder"]}
