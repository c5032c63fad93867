"""From a text-to-image folder to the base that GDPO starts from: what a run of the supervised trainer leaves, and how
it is loaded, merged, exported and refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from _naosd import recipe, write_base
from _support import snapshot
from safetensors.torch import load_file

import rewardsr
from rewardsr import Draws, UserError, load_adapter, lora
from rewardsr.hub.content import read_run
from rewardsr.lora import exchange
from rewardsr.run_folder import FULL, LORA, OUR_HEADER, RECIPE
from rewardsr.testing import tiny_pipeline
from rewardsr.train.recipe import load_recipe
from rewardsr.weights import read_safetensors, write_safetensors

FILES = ("trainer_options.vgg=vgg.safetensors", "trainer_options.lpips=heads.pth")
KINDS = ("input", "none", "denoiser", "all")
TIMES = {"noise_t": 250, "net_t": 100, "scale": 4}
LQ = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and a run of each kind on it."""
    made = write_base(tmp_path_factory.mktemp("stage-one"))
    for full in KINDS:
        rewardsr.finetune(recipe(made, full, trainer_options={"full": full, "lpips_weight": 0}, steps=2))
    tiny_pipeline(made / "upscaler", family="upscaler")
    adapter = adapter_on(made)
    lora.attach(adapter)
    (made / "unet-only").mkdir()
    lora.save(adapter, made / "unet-only")
    return made


def adapter_on(folder: Path, **more):
    return load_adapter("osediff", folder / "base", **TIMES, **more)


def output(adapter) -> torch.Tensor:
    with torch.no_grad():
        return adapter.sample(adapter.encode(LQ), Draws(0, 0, [0]))


@pytest.fixture(scope="module")
def tuned(folder) -> dict[str, torch.Tensor]:
    """What the pipeline of each run makes of an image."""
    return {full: output(rewardsr.load_lora(adapter_on(folder), folder / full)) for full in KINDS}


@pytest.mark.parametrize("full", KINDS)
def test_a_run_merged_networks_and_the_run_as_weights_are_one_base(full, folder, tuned, tmp_path) -> None:
    carrying = rewardsr.load_lora(adapter_on(folder), folder / full)
    exchange.export(carrying, tmp_path / "merged", "merged")
    assert not lora.attached(carrying)
    ways = [carrying, adapter_on(folder, weights=tmp_path / "merged"), adapter_on(folder, weights=folder / full)]
    if full in ("input", "none"):
        ways.append(adapter_on(folder, weights=folder / full / LORA))
    outputs = [output(way) for way in ways]
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    assert float((outputs[0] - tuned[full]).abs().max()) <= 1e-5
    assert float((outputs[0] - output(adapter_on(folder))).abs().max()) > 1e-3
    assert len({way.base_model.fingerprint for way in ways[1:]}) == 1
    assert ways[1].base_model.fingerprint != adapter_on(folder).base_model.fingerprint


@pytest.mark.parametrize("full", KINDS)
def test_strength_goes_from_the_base_to_the_run(full, folder, tuned) -> None:
    base = output(adapter_on(folder))
    off, half = (adapter_on(folder) for _ in range(2))
    rewardsr.load_lora(off, folder / full, 0.0)
    rewardsr.load_lora(half, folder / full, 0.5)
    assert torch.equal(output(off), base)
    assert 0 < float((output(half) - base).norm()) < float((tuned[full] - base).norm())
    whole = rewardsr.load_lora(adapter_on(folder), folder / full)
    with lora.reference(whole):
        assert float((output(whole) - base).abs().max()) <= 1e-5  # weights that lie elsewhere in memory round otherwise
    assert torch.equal(output(whole), tuned[full])


def test_gdpo_goes_on_from_a_run(folder, commands, tmp_path) -> None:
    """The walk of the two recipes, by commands: merged, the run itself as weights, and as a LoRA to go on with."""
    merged = tmp_path / "merged"
    assert commands("export", merged, "--format", "merged", "--run", folder / "input").code == 0
    ways = {
        "by-folder": f"adapter_options.weights={merged}",
        "by-run": f"adapter_options.weights={folder / 'input'}",
        "by-lora": f"lora.init={folder / 'input'}",
    }
    made = {}
    for name, how in ways.items():
        more = ("--trainer", "gdpo", "--set", how, "--set", "adapter_options.net_t=100")
        answer = commands.finetune(folder / "base", folder / "images", tmp_path / name, *more, "--set", "data.crop=16")
        assert answer.code == 0, answer.err
        shown = tmp_path / f"{name}-shown"
        answer = commands("upscale", folder / "images" / "000.png", "-o", shown, "--run", tmp_path / name)
        assert answer.code == 0, answer.err
        made[name] = (shown / "000.png").read_bytes()
    first, second = (load_file(tmp_path / name / LORA) for name in ("by-folder", "by-run"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(name.startswith("vae.") for name in first) and made["by-folder"] == made["by-run"]
    # What goes on with the LoRA keeps the encoder's, and the weights in full beside it.
    kept, start = (load_file(path / LORA) for path in (tmp_path / "by-lora", folder / "input"))
    assert all(torch.equal(value, kept[name]) for name, value in start.items() if name.startswith("vae."))
    assert any(not torch.equal(value, kept[name]) for name, value in start.items())
    assert (tmp_path / "by-lora" / FULL).is_file()


def test_the_trainer_goes_on_from_its_own_lora(folder) -> None:
    own = {"trainer_options": {"lpips_weight": 0}, "steps": 1}
    again = rewardsr.finetune(recipe(folder, "again", **own, lora={"init": str(folder / "input")})).output
    start, end = (load_file(run / FULL) for run in (folder / "input", again))
    base = adapter_on(folder).unet.conv_in
    assert not torch.equal(start["unet.conv_in.bias"], end["unet.conv_in.bias"])
    assert float((end["unet.conv_in.bias"] - start["unet.conv_in.bias"]).abs().max()) <= 2e-3
    assert not torch.equal(start["unet.conv_in.bias"], base.bias)
    fresh = rewardsr.finetune(recipe(folder, "fresh", **own)).output
    assert not torch.equal(load_file(fresh / FULL)["unet.conv_in.bias"], end["unet.conv_in.bias"])


def test_a_run_is_evaluated_against_its_base(folder) -> None:
    found = rewardsr.evaluate(rewardsr.load_lora(adapter_on(folder), folder / "all"), folder / "images", ["psnr"])
    assert found.rewards["psnr"].base != found.rewards["psnr"].tuned


def test_two_files_for_diffusers(folder, tmp_path) -> None:
    """Of UNet and encoder, where no weights in full are among what was trained."""
    exchange.export(rewardsr.load_lora(adapter_on(folder), folder / "none"), tmp_path / "two", "diffusers")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {LORA, "vae_lora.safetensors"}
    again = adapter_on(folder)
    exchange.load_component(again.vae, tmp_path / "two" / "vae_lora.safetensors")
    assert any(".lora_B." in name and value.any() for name, value in again.vae.named_parameters())


# ---- refusals ----


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_other_forms_hold_no_weights_in_full(form, folder, tmp_path) -> None:
    for full in ("input", "all"):
        carrying = rewardsr.load_lora(adapter_on(folder), folder / full)
        with pytest.raises(UserError, match=r"trained in full, and .* holds a LoRA alone: export --format merged"):
            exchange.export(carrying, tmp_path / "out", form)
    assert snapshot(tmp_path) == {}


def test_a_lora_whose_weights_in_full_are_gone_is_refused(folder, tmp_path) -> None:
    shutil.copy(folder / "input" / LORA, tmp_path / LORA)
    with pytest.raises(UserError, match=f"no file '.*{FULL}'"):
        rewardsr.load_lora(adapter_on(folder), tmp_path)
    for full in ("input", "all"):
        with pytest.raises(UserError, match="in full cannot be combined"):
            lora.load_several(adapter_on(folder), [(folder / full, 0.5), (folder / "none", 0.5)])


def spoiled(folder: Path, tmp_path: Path, change) -> Path:
    tensors, header = read_safetensors(folder / "all" / FULL)
    change(tensors, header)
    write_safetensors(tmp_path / FULL, tensors, header)
    return tmp_path


def _another_base(tensors, header) -> None:
    about = json.loads(header[OUR_HEADER])
    about["base"] |= {"fingerprint": about["base"]["fingerprint"][:-8] + "00000000"}
    header[OUR_HEADER] = json.dumps(about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.clear(), "does not say which base it belongs to"),
        (lambda tensors, header: header.update({OUR_HEADER: "{}"}), "does not say which base it belongs to"),
        (lambda tensors, header: tensors.update({"unet.extra": torch.zeros(1)}), "unet.extra .* no weight here"),
        (lambda tensors, header: tensors.update({"unet.conv_in.bias": torch.zeros(1)}), r"conv_in.bias is \(1,\)"),
        (lambda tensors, header: tensors["unet.conv_in.bias"].fill_(torch.nan), "values that are not finite"),
    ],
)
def test_weights_in_full_that_do_not_fit_are_refused(change, message, folder, tmp_path) -> None:
    adapter = adapter_on(folder)
    before = output(adapter)
    with pytest.raises(UserError, match=message):
        rewardsr.load_lora(adapter, spoiled(folder, tmp_path, change))
    assert torch.equal(output(adapter), before)


def test_weights_in_full_of_another_base_are_refused(folder, tmp_path) -> None:
    other = load_adapter("osediff", tiny_pipeline(tmp_path / "other", seed=1), **TIMES)
    for source in ("all", "input"):
        with pytest.raises(UserError, match=r"was trained on base .* other weights"):
            rewardsr.load_lora(other, folder / source)
    rewardsr.load_lora(other, folder / "all", force_base=True)
    with pytest.raises(UserError, match=r"was trained on base .* other weights"):
        load_adapter("osediff", tmp_path / "other", weights=folder / "input", **TIMES)


def test_what_is_published_is_a_lora(folder) -> None:
    for full in ("input", "all"):
        with pytest.raises(UserError, match="trained weights in full, and what is published is a LoRA"):
            read_run(folder / full)
    assert LORA in read_run(folder / "none")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("trainer_options.lpips_weight=2",), r"LPIPS: vgg16-397923af.pth cannot be found in a cache.*lpips_weight=0"),
        (("trainer_options.lpips_weight=2", "trainer_options.vgg=gone.pth"), "LPIPS: no weights file 'gone.pth'"),
        (("trainer_options.mse_weight=0", "trainer_options.vsd_weight=0"), "nothing to train on"),
        (("trainer_options.vsd_times=[0.5,0.5]",), "hold no time"),
        (("trainer_options.full=some",), "'full' is 'some'"),
        (("trainer_options.lpips=1", "trainer_options.lipps_weight=1"), "unknown key 'lipps_weight'"),
        (("rewards=[{name: psnr}]",), "trainer 'naosd' learns from HQ images, and no reward steers it: give 'psnr'"),
        (("trainer=gdpo", "trainer_options={}"), "trainer 'gdpo' learns from rewards, and the recipe names none"),
        (("adapter=sd_upscaler", "adapter_options={}", "base=upscaler"), "naosd trains pipelines of one step"),
        (("trainer_options.full=all", "lora.init=none"), "trains no LoRA here, but weights in full: give"),
        (("lora.init=unet-only",), "has nothing on 'vae', which trainer 'naosd' adapts here, too"),
        (("data.crop=8", "trainer_options.lpips_weight=1", *FILES), "LPIPS needs 16 pixels a side"),
    ],
)
def test_bad_input_is_one_line_before_any_work(changes, message, folder, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    settings = ("adapter_options.noise_t=250", "trainer_options.lpips_weight=0", "data.crop=16", *changes)
    command = ("finetune", "--trainer", "naosd", "--base", "base", "--data", "images", "--steps", 1, "--device", "cpu")
    said = refused(*command, "--output", tmp_path / "run", *(p for change in settings for p in ("--set", change)))
    assert re.search(message, said), said


def test_rewards_of_weight_0_are_watched(folder) -> None:
    held_out = {"validation": str(folder / "images"), "validation_limit": 1}
    own = {"trainer_options": {"lpips_weight": 0, "vsd_weight": 0}, "rewards": [{"name": "detail", "weight": 0}]}
    run = rewardsr.finetune(recipe(folder, "watched", **own, steps=1, data=held_out)).output
    assert {"detail", "psnr"} == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"].keys()
    assert load_recipe(str(run / RECIPE), {}, []).rewards[0].weight == 0
