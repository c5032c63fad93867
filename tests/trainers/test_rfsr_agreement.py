"""Agreement of RFSR's step and losses with vectors measured on RFSR, on a tiny SeeSR."""

import json
from dataclasses import replace

import pytest
import torch
from _support import picked

from rewardsr import Batch, load_adapter, lora
from rewardsr.draws import Replay
from rewardsr.rewards import build, distances
from rewardsr.rewards.vgg import VGG19
from rewardsr.trainers import rfsr
from rewardsr.trainers.ema import average
from rewardsr.trainers.rfsr import FINE, RFSR, RFSROptions


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str, record) -> None:
    assert ours.shape == theirs.shape, what
    error = float((ours - theirs).detach().abs().max())
    record(f"{what} ({tolerance:g})", f"{error:.2e}")
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:g}"


def relative(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str, record) -> None:
    close(ours / theirs.abs().max(), theirs / theirs.abs().max(), tolerance, what, record)


@pytest.fixture(scope="module")
def narrow(data) -> VGG19:
    return VGG19(str(data / "vgg19_narrow.safetensors"))


def prepared(data, v, index: int):
    """The method and its group, as the released code prepares it: start latents at every step."""
    adapter = load_adapter("seesr", data / "tiny_seesr", scale=1, template="{tags}")
    lora.attach(adapter)
    options = RFSROptions(rollout="none", vgg=str(data / "vgg19_narrow.safetensors"))
    method = RFSR(adapter, {"detail": build("detail")}, {"detail": 5e-5}, options)
    place = [*range(20), *range(40, 50)].index(index)
    draws = Replay([torch.tensor([place]), torch.tensor([FINE - 1]), v["lq_noise_vae"], v["noise"]])
    batch = Batch(v["lq"], v["gt"], ("a bird",), extras={"ram": v["image_encoder_hidden_states"]})
    group = method.prepare(batch, draws)
    assert draws.left == 0 and group.step.tolist() == [index]
    return method, replace(group, condition=replace(group.condition, text=v["encoder_hidden_states"]))


def test_the_schedule(data) -> None:
    adapter = load_adapter("seesr", data / "tiny_seesr", scale=1)
    assert list(adapter.steps) == json.loads((data / "rfsr_step.json").read_text())["timesteps_50"]


@pytest.mark.parametrize("index", [5, 40])
def test_step_without_rollout(index, data, golden, record_property) -> None:
    v = golden("rfsr_step")
    method, group = prepared(data, v, index)
    adapter = method.adapter
    close(*picked(group.condition.latents, v, "lq_latents"), 1e-5, "LQ latents", record_property)
    close(*picked(group.z_t, v, "start_latents"), 1e-6, "start latents", record_property)
    with torch.no_grad():
        t = adapter.steps[index]
        eps = adapter.predict(group.z_t, t, group.condition)
        a = adapter.schedule.alphas_cumprod[t]
        close(*picked(eps, v, f"i{index}.noise_pred"), 2e-5, f"prediction at {index}", record_property)
        x0 = (group.z_t - (1 - a).sqrt() * eps) / a.sqrt()
        close(*picked(x0, v, f"i{index}.x0"), 2e-4, f"x0 at {index}", record_property)
        image = method._image(group, torch.tensor([0]))
    close(*picked(image, v, f"i{index}.image"), 2e-5, f"image at {index}", record_property)


def test_gradients_of_the_weights(data, golden, record_property) -> None:
    """The recorded gradient of the image, carried back to the weights that RFSR trains."""
    v = golden("rfsr_step")
    method, group = prepared(data, v, 5)
    networks = {"cn": method.adapter.controlnet, "unet": method.adapter.unet}
    keys = [key.partition("@")[0] for key in v if key.startswith("i5.grad.")]
    assert len(keys) == 9
    wanted = []
    for key in keys:
        _, _, network, name = key.split(".", 3)
        own = dict(networks[network].named_parameters())
        module, _, kind = name.rpartition(".")
        parameter = own[name] if name in own else own[f"{module}.base_layer.{kind}"]
        wanted.append(parameter.requires_grad_())
    image = method._image(group, torch.tensor([0]))
    found = torch.autograd.grad(image, wanted, v["i5.grad_image"])
    for key, gradient in zip(keys, found, strict=True):
        relative(*picked(gradient, v, key), 1e-4, "gradients, relative to the largest", record_property)


def test_style_distance_of_the_recorded_step(narrow, golden, record_property) -> None:
    v = golden("rfsr_step")
    image = v["i40.image"].clone().requires_grad_()
    distance = distances.style_distance(narrow(image), narrow(v["i40.ref_image"]))
    relative(*picked(distance.mean(), v, "i40.kl_fp32_unweighted"), 1e-5, "Gram-KL at 40, relative", record_property)
    distance.mean().backward()
    relative(*picked(image.grad, v, "i40.grad_image"), 1e-4, "its gradient, relative", record_property)


def test_style_distance_and_features(narrow, golden, data, record_property) -> None:
    v, about = golden("rfsr_losses"), json.loads((data / "rfsr_losses.json").read_text())
    assert about["kl.layer_weights"] == distances.STYLE_WEIGHTS
    image = v["kl.x"].clone().requires_grad_()
    features, target = narrow(image), narrow(v["kl.y"])
    for layer in distances.STYLE_WEIGHTS:
        recorded = picked(features[layer], v, f"kl.feat_x.{layer}")
        relative(*recorded, 1e-5, f"features {layer}, relative", record_property)
        difference = (distances.gram(features[layer]) - distances.gram(target[layer])).abs().mean()
        assert abs(float(difference) - about["kl.layer_l1_fp32"][layer]) <= 1e-5 * about["kl.layer_l1_fp32"][layer]
    for layer in ("conv1_2", "conv5_4"):
        gram = distances.gram(features[layer])
        close(*picked(gram, v, f"kl.gram32_x.{layer}"), 1e-5, f"Gram matrix {layer}", record_property)
    distance = distances.style_distance(features, target)
    assert distance.shape == (2,)
    relative(*picked(distance.mean(), v, "kl.loss_fp32"), 1e-5, "Gram-KL, relative", record_property)
    distance.mean().backward()
    relative(*picked(image.grad, v, "kl.grad_x_fp32"), 1e-4, "gradient of Gram-KL, relative", record_property)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_haar(level, golden, record_property) -> None:
    v = golden("rfsr_losses")
    sr = v["a.x"].clone().requires_grad_()
    close(*picked(distances.haar_low(sr, level), v, f"a.haar_LL{level}_x"), 1e-5, f"Haar band {level}", record_property)
    loss = distances.structure(sr, v["a.y"], level)
    relative(*picked(loss.mean(), v, f"a.haar_loss{level}"), 1e-5, f"Haar loss {level}, relative", record_property)
    if level == 3:
        loss.mean().backward()
        relative(*picked(sr.grad, v, "a.haar_grad3"), 1e-4, "gradient of Haar loss 3, relative", record_property)


def test_hinges(golden, record_property) -> None:
    v = golden("rfsr_losses")
    r = v["hinge.imagereward_r"].flatten().requires_grad_()
    loss = 5e-6 * rfsr.hinge(r, 2.0).mean()
    loss.backward()
    relative(*picked(loss, v, "hinge.imagereward_loss"), 1e-5, "ImageReward hinge, relative", record_property)
    relative(r.grad, v["hinge.imagereward_grad"].flatten(), 1e-5, "its gradient, relative", record_property)
    # The released code averages CLIPIQA before the hinge; below the margin that is the same.
    q = v["hinge.clipiqa_q"].flatten().requires_grad_()
    loss = 5e-5 * rfsr.hinge(q, 2.0).mean()
    loss.backward()
    relative(*picked(loss, v, "hinge.clipiqa_loss"), 1e-5, "CLIPIQA hinge, relative", record_property)
    relative(q.grad, v["hinge.clipiqa_grad"].flatten(), 1e-5, "its gradient, relative", record_property)


def test_moving_average(golden, record_property) -> None:
    v = golden("rfsr_losses")
    target = v["ema.target"].clone()
    average([target], [v["ema.source"]], 0.999)
    close(*picked(target, v, "ema.out"), 1e-6, "moving average", record_property)
    assert float((target - v["ema.self_alias_out"]).abs().max()) > 1e-4  # the released ControlNet's, a mistake
