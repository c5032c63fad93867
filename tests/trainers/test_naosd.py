"""The supervised trainer on a tiny base: what it trains and what it leaves alone, and runs that go on bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _naosd import adapter_on, batch, left, make, newest, recipe, write_base
from runs import ENVIRONMENT, PATIENCE, lines
from safetensors.torch import load_file

import rewardsr
from rewardsr import Batch, Draws, lora
from rewardsr.options import parse
from rewardsr.run_folder import FULL, LORA, TRAINED
from rewardsr.storage import write_text
from rewardsr.testing import check_trainer
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.trainers.naosd import FAKE, NAOSD

KINDS = ("input", "none", "denoiser", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("naosd"))


def gradients(method: NAOSD, images: Batch | None = None) -> dict[str, torch.Tensor]:
    images = images or batch()
    for value in method.trained_weights().values():
        value.grad = None
    for loss in method.losses(method.prepare(images, Draws(0, 0, [0, 1])), Draws(0, 0, [0, 1], "update-0")):
        loss.value.backward()
    return {name: value.grad.clone() for name, value in method.trained_weights().items()}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding, which depends on where in memory weights lie."""
    return float((one - other).abs().max()) <= 1e-5


# ---- the method ----


@pytest.mark.parametrize("full", KINDS)
def test_keeps_the_contract(full, folder) -> None:
    files = {"vgg": str(folder / "vgg.safetensors"), "lpips": str(folder / "heads.pth")}
    check_trainer(NAOSD, options={"full": full, **files})


def test_what_is_trained(folder) -> None:
    keys = {full: make(adapter_on(folder), full=full).trained_weights().keys() for full in KINDS}
    parts = {full: {name.partition(".lora_")[0] for name in found} for full, found in keys.items()}
    assert {"lora/unet.conv_in", "lora/vae.encoder.conv_in", "lora/vae.quant_conv"} < parts["none"]
    assert parts["input"] - parts["none"] == {"lora/unet.conv_in.weight", "lora/unet.conv_in.bias"}
    fake = {name for name in parts["none"] if name.startswith("fake/")}
    assert fake and {name for name in parts["all"] if name.startswith("fake/")} == fake
    network = adapter_on(folder)
    own = {f"lora/unet.{name}" for name, _ in network.unet.named_parameters()}
    encoder = {f"lora/vae.{name}" for name, _ in network.vae.named_parameters()}
    encoder = {name for name in encoder if name.startswith(("lora/vae.encoder.", "lora/vae.quant_conv."))}
    assert parts["all"] - fake == own | encoder
    assert parts["denoiser"] - fake == own


@pytest.mark.parametrize("full", KINDS)
def test_the_teacher_is_the_base_and_the_fake_score_is_the_base_with_its_lora(full, folder) -> None:
    method = make(adapter_on(folder), full=full)
    adapter, plain = method.adapter, adapter_on(folder)
    z, condition = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), plain.encode(batch())
    with torch.no_grad():
        expected = plain.predict(z, 300, condition)
        with lora.only(adapter):
            assert close(adapter.predict(z, 300, condition), expected)
        lora.attach(
            plain, method.options.fake_rank, 2 * method.options.fake_rank, name=FAKE, targets=plain.lora_targets
        )
        lora.load_state_dict(plain, lora.state_dict(adapter, FAKE), name=FAKE)
        expected = plain.predict(z, 300, condition)
        with lora.only(adapter, FAKE):
            assert close(adapter.predict(z, 300, condition), expected)
        assert not close(adapter.predict(z, 300, condition), expected)


@pytest.mark.parametrize("full", KINDS)
def test_checkpointed_networks_give_the_same_gradients(full, folder) -> None:
    """What is computed again on the way back must be so with the LoRAs that it was computed with."""
    method = make(adapter_on(folder), full=full)
    plain = gradients(method)
    method.adapter.enable_gradient_checkpointing()
    again = gradients(method)
    assert all(torch.allclose(value, again[name], rtol=1e-4, atol=1e-7) for name, value in plain.items())


def test_the_fake_scores_error_reaches_its_lora_alone_and_the_others_the_rest(folder) -> None:
    method = make(adapter_on(folder))
    with_vsd, fake = gradients(method), {}
    for loss in list(method.losses(method.prepare(batch(), Draws(0, 0, [0, 1])), Draws(0, 0, [0, 1], "update-0")))[1:]:
        for value in method.trained_weights().values():
            value.grad = None
        loss.value.backward()
        fake = {name: value.grad for name, value in method.trained_weights().items() if value.grad is not None}
    assert {name.partition("/")[0] for name in fake} == {"fake"}
    assert all(torch.equal(value, with_vsd[name]) for name, value in fake.items())
    without = gradients(make(adapter_on(folder), vsd_weight=0))
    assert without.keys() == {name for name in with_vsd if name.startswith("lora/")}
    assert any(not torch.equal(value, with_vsd[name]) for name, value in without.items())


def test_the_squared_error_is_that_of_images_between_minus_one_and_one(folder) -> None:
    method, images = make(adapter_on(folder), vsd_weight=0), batch()
    (loss,) = method.losses(method.prepare(images, Draws(0, 0, [0, 1])), Draws(0, 0, [0, 1], "update-0"))
    draws = Draws(0, 0, [0, 1], "update-0")
    with torch.no_grad():
        sr = method.adapter.sample(method.adapter.encode(images, generator=draws), draws)
    expected = (2 * sr - 2 * images.hq).square().mean()
    assert float(loss.metrics["loss/mse"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_guidance_of_one_asks_the_frozen_base_once(folder, monkeypatch) -> None:
    """What is left out there is what would cancel out: the prediction that is guided away from."""
    found, rows = [], []
    for guidance in (1.0, 1.0 + 1e-6):
        method = make(adapter_on(folder), full="none", vsd_guidance=guidance)
        given, z0 = method.adapter.encode(batch()), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        plain = method.adapter.predict
        monkeypatch.setattr(
            method.adapter, "predict", lambda z, *rest, plain=plain: rows.append(len(z)) or plain(z, *rest)
        )
        found.append(method.distillation(z0, given, Draws(0, 0, [0, 1])))
    assert rows == [2, 2, 2, 4] and abs(float(found[0] - found[1])) <= 1e-4 * float(found[0])


@pytest.mark.parametrize("full", KINDS)
def test_in_bf16_what_is_trained_stays_float32(full, folder) -> None:
    method = make(adapter_on(folder, dtype=torch.bfloat16), full=full)
    ours, exact = gradients(method), gradients(make(adapter_on(folder), full=full))
    assert {value.dtype for value in method.trained_weights().values()} == {torch.float32}
    flat = [torch.cat([part[name].flatten() for name in exact if name.startswith("lora/")]) for part in (ours, exact)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.2
    assert method.adapter.vae.decoder.conv_in.weight.dtype == torch.bfloat16


# ---- runs ----


@pytest.mark.parametrize("full", KINDS)
def test_a_run_that_goes_on_ends_like_a_straight_one(full, folder) -> None:
    plain = {"optimiser": {"schedule": "constant", "warmup": 0}, "trainer_options": {"full": full}}
    plain["data"] = {"validation": str(folder / "images"), "validation_limit": 1}
    straight = rewardsr.finetune(recipe(folder, f"straight-{full}", **plain)).output
    rewardsr.finetune(recipe(folder, f"resumed-{full}", **plain | {"steps": 2}))
    resumed = rewardsr.finetune(recipe(folder, f"resumed-{full}", **plain), resume=True).output
    ours, theirs = left(straight), left(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert lines(straight) == lines(resumed)
    told = lines(straight)[-2]
    assert {"loss", "loss/mse", "loss/lpips", "loss/vsd", "loss/fake", "grad_norm", "grad_norm/fake"} <= told.keys()
    assert (straight / LORA).is_file() == (full in ("input", "none")) and (straight / FULL).is_file() == (
        full != "none"
    )
    assert not any(FAKE in name for name in ours if name.startswith((LORA, FULL)))
    kept = load_file(newest(straight) / TRAINED)
    assert all(value.any() for name, value in kept.items() if ".lora_B." in name)
    if full != "none":
        base = adapter_on(folder).unet.conv_in
        assert not torch.equal(kept["lora/unet.conv_in.bias"], base.bias)
        assert not torch.equal(kept["lora/unet.conv_in.weight"], base.weight)


def test_images_a_pass_change_nothing_but_rounding(folder) -> None:
    plain = {"batch_size": 3, "optimiser": {"eps": 1e-3}}
    whole = rewardsr.finetune(recipe(folder, "whole", **plain)).output
    parts = rewardsr.finetune(recipe(folder, "parts", **plain, trainer_options={"micro_batch": 2})).output
    ours, theirs = left(whole), left(parts)
    assert max(float((value - theirs[name]).abs().max()) for name, value in ours.items()) <= 1e-4
    for line, other in zip(lines(whole), lines(parts), strict=True):
        assert other == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in line.items()}


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(folder) -> None:
    plain = {"steps": 3, "optimiser": {"eps": 1e-3}}
    made = parse(Recipe, recipe(folder, "two", **plain, batch_size=1), "recipe")
    write_text(folder / "two.yaml", to_yaml(made))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "rewardsr", "finetune", str(folder / "two.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    one = rewardsr.finetune(recipe(folder, "one", **plain)).output
    ours, theirs = left(one), left(folder / "two")
    assert max(float((value - theirs[name]).abs().max()) for name, value in ours.items()) <= 1e-5
    for line, other in zip(lines(one), lines(folder / "two"), strict=True):
        assert other == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in line.items()}
