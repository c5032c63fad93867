"""What users of RFSR, SeeSR and the upscaler get wrong: one clear line, exit code 2, nothing written, nothing fetched.

Rewards and taggers that misbehave are in `strangers.py`.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from _data import DATA
from _matrix import write_extras
from _support import Commands
from safetensors.torch import load_file, save_file

from rewardsr.adapters.seesr import add_image_attentions
from rewardsr.hub import connection

pytestmark = pytest.mark.usefixtures("contacted")

VGG = DATA / "vgg19_narrow.safetensors"


# ---- helpers ----


def line(base: Any, data: Any, output: Any, *more: Any, adapter: str = "osediff", rewards: str = "detail") -> list[Any]:
    """A short RFSR run as a command line; `more` comes last and overrides."""
    settings = ["data.crop=32", f"trainer_options.vgg={VGG}"] + (["adapter_options.steps=5"] * (adapter != "osediff"))
    where = ["--adapter", adapter, "--base", base, "--data", data, "--output", output, "--rewards", rewards]
    chosen = [part for setting in settings for part in ("--set", setting)]
    return ["finetune", *where, "--trainer", "rfsr", "--steps", 2, "--device", "cpu", *chosen, *more]


def change(config: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory) -> Path:
    from rewardsr.testing import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("upscaler"), family="upscaler")


@pytest.fixture
def images(hq_folder, tmp_path) -> Path:
    """Three images with embeddings beside them, to be spoiled."""
    return write_extras(Path(shutil.copytree(hq_folder, tmp_path / "images")), 3)


@pytest.fixture
def seesr(tiny_seesr, tmp_path) -> Path:
    """A copy of the tiny SeeSR, to be spoiled."""
    return Path(shutil.copytree(tiny_seesr, tmp_path / "seesr"))


# ---- embeddings and taggers ----


def test_embeddings_that_are_as_they_should_be(commands: Commands, tiny_seesr, images, tmp_path) -> None:
    """What the tests below spoil works while it is whole."""
    answer = commands(*line(tiny_seesr, images, tmp_path / "run", "--validation", images, adapter="seesr"))
    assert answer.code == 0, answer.err


def test_seesr_without_embeddings_says_how_to_supply_them(refused, tiny_seesr, hq_folder, tmp_path) -> None:
    for trainer in ("rfsr", "gdpo"):
        more = ("--trainer", trainer, "--set", "trainer_options={}")
        said = refused(*line(tiny_seesr, hq_folder, tmp_path / "run", *more, adapter="seesr"))
        for word in ("<name>.safetensors", "'ram'", "(tokens, 512)", "extras/", "option tagger"):
            assert word in said


def test_held_out_images_without_embeddings(refused, tiny_seesr, images, hq_folder, tmp_path) -> None:
    more = ("--validation", hq_folder)
    assert "'ram'" in refused(*line(tiny_seesr, images, tmp_path / "run", *more, adapter="seesr"))


@pytest.mark.parametrize("role", ["data", "validation"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", "001.png"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("text", "damaged"),
        ({"tokens": torch.zeros(10, 512)}, "holds no tensor 'ram', only tokens"),
        ({"ram": torch.zeros(9, 512)}, "equal shapes"),
        ({"ram": torch.full((10, 512), torch.nan)}, "not finite"),
    ],
    ids=["missing", "truncated", "empty", "text", "unnamed", "shorter", "nan"],
)
def test_one_file_of_embeddings_that_is_spoiled(
    refused, tiny_seesr, images, hq_folder, tmp_path, damage, says, role
) -> None:
    whole = write_extras(Path(shutil.copytree(hq_folder, tmp_path / "whole")), 3)
    path = images / "001.safetensors"
    if isinstance(damage, dict):
        save_file(damage, path)
    elif damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"embeddings"}[damage])
    where = (images, tmp_path / "run") if role == "data" else (whole, tmp_path / "run", "--validation", images)
    said = refused(*line(tiny_seesr, *where, adapter="seesr"))
    assert says in said and "001." in said


@pytest.mark.parametrize("role", ["data", "validation"])
@pytest.mark.parametrize("shape", [(10, 256), (512,), (1, 10, 512)])
def test_embeddings_of_another_width_than_the_networks(
    refused, tiny_seesr, images, hq_folder, tmp_path, shape, role
) -> None:
    folder = Path(shutil.copytree(hq_folder, tmp_path / "other"))
    write_extras(folder, 3, ram=torch.zeros(shape))
    where = (folder, tmp_path / "run") if role == "data" else (images, tmp_path / "run", "--validation", folder)
    assert "(1, tokens, 512)" in refused(*line(tiny_seesr, *where, adapter="seesr"))


@pytest.mark.parametrize(
    ("tagger", "says"),
    [
        ("no_such_module:Tagger", "importing no_such_module failed"),
        ("strangers:Tagger", "has no 'Tagger'"),
        ("ram", "unknown tagger 'ram'"),
        ("strangers:NUMBER", "expected a function, or a class"),
        ("taggers:narrow", "(1, 10, 256)"),
        ("strangers:untagged", "tagger"),
        ("strangers:alone", "tagger"),
        ("strangers:failing", "no weights for the tagger"),
    ],
)
def test_taggers_that_cannot_be_used(refused, tiny_seesr, hq_folder, tmp_path, tagger, says) -> None:
    more = ("--set", f"adapter_options.tagger={tagger}")
    assert says in refused(*line(tiny_seesr, hq_folder, tmp_path / "run", *more, adapter="seesr"))


def test_a_fresh_process_says_no_more_than_that(tiny_seesr, hq_folder, tmp_path) -> None:
    """What the libraries below say while they are imported is heard in the first command of a process only."""
    command = line(tiny_seesr, hq_folder, tmp_path / "run", adapter="seesr")
    done = subprocess.run(
        [sys.executable, "-m", "rewardsr", *map(str, command)], capture_output=True, text=True, timeout=300
    )
    said = [one for one in done.stderr.splitlines() if not one.startswith("loading ")]  # on a slow machine
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: adapter 'seesr'"), done.stderr
    assert not (tmp_path / "run").exists()


# ---- bases ----


def test_unet_and_controlnet_of_different_sizes(refused, seesr, images, tmp_path) -> None:
    config = json.loads((seesr / "controlnet" / "config.json").read_text())
    config.pop("use_image_cross_attention")
    other = diffusers.ControlNetModel.from_config({**config, "block_out_channels": [8, 16]})
    add_image_attentions(other, 512)
    other.save_pretrained(seesr / "controlnet")
    assert "do not fit each other: block_out_channels" in refused(
        *line(seesr, images, tmp_path / "run", adapter="seesr")
    )


def test_a_scheduler_of_an_unknown_prediction_type(refused, seesr, upscaler, images, tmp_path) -> None:
    base = Path(shutil.copytree(upscaler, tmp_path / "upscaler"))
    for adapter, folder in (("seesr", seesr), ("sd_upscaler", base)):
        change(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
        said = refused(*line(folder, images, tmp_path / "run", adapter=adapter))
        assert "prediction type 'sample' is not epsilon or v_prediction" in said


def test_the_base_of_another_adapter(refused, tiny_base, tiny_seesr, upscaler, images, tmp_path) -> None:
    said = {
        ("seesr", upscaler): "has no folder 'controlnet/'",
        ("seesr", tiny_base): "has no folder 'controlnet/'",
        ("sd_upscaler", tiny_seesr): "has no folder 'low_res_scheduler/'",
        ("sd_upscaler", tiny_base): "has no folder 'low_res_scheduler/'",
        ("osediff", upscaler): "the UNet takes 7 channels",
    }
    for (adapter, base), words in said.items():
        more = ("--set", "adapter_options={}")
        assert words in refused(*line(base, images, tmp_path / "run", *more, adapter=adapter)), (adapter, base)


# ---- rewards ----


def test_a_metric_without_gradients_may_only_watch(commands: Commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    pytest.importorskip("pyiqa")
    more = ("--set", "data.crop=48")  # piqe looks at blocks of 16 pixels
    said = refused(*line(tiny_base, hq_folder, tmp_path / "run", *more, rewards="detail=1,piqe=0.5"))
    assert "reward 'piqe' is not differentiable" in said and "weight 0" in said
    watching = line(tiny_base, hq_folder, tmp_path / "run", *more, rewards="detail=1,piqe=0")
    answer = commands(*watching, "--validation", hq_folder)
    assert answer.code == 0, answer.err
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "piqe" in json.loads(last)["validation"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Rounded", "zero everywhere"),
        ("Root", "not finite"),
        ("Detached", "is cut"),
        ("Shifted", "does not reach that image"),
        ("InPlace", "fails when its gradient is tried"),
    ],
)
def test_a_reward_whose_gradient_is_of_no_use(refused, tiny_base, hq_folder, tmp_path, kind, why) -> None:
    name = f"strangers:{kind}"
    said = refused(*line(tiny_base, hq_folder, tmp_path / "run", rewards=f"detail=1,{name}=0.5"))
    assert f"'{name}'" in said and why in said


def imagereward(**options: Any) -> tuple[str, str]:
    return "--set", f"rewards={json.dumps([{'name': 'imagereward', 'options': options}])}"


def test_imagereward_without_prompts(commands: Commands, refused, tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "rewards"))
    from _imagereward import WORDS, released_state, save, small

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    weights = save(released_state(), tmp_path / "ImageReward.pt")
    options = imagereward(weights=str(weights), tokenizer=str(tmp_path / "vocab.txt"))
    with small():
        said = refused(*line(tiny_base, hq_folder, tmp_path / "run", *options))
        assert "needs prompts" in said and "data.prompts" in said
        answer = commands(*line(tiny_base, hq_folder, tmp_path / "run", *options, "--set", "data.prompts=a cat"))
    assert answer.code == 0, answer.err


def test_imagereward_offline_without_weights(refused, tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    command = line(tiny_base, hq_folder, tmp_path / "run", *imagereward())
    refused(*command)  # pays for the imports
    began = time.monotonic()
    said = refused(*command)
    assert time.monotonic() - began < 15  # the Hub's client alone would try for 23
    assert "imagereward" in said and "weights" in said


# ---- options of the method ----


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("structure_wieght=1", "did you mean 'structure_weight'?"),
        ("group_size=4", "unknown key 'group_size'"),
        ("reward_crops=16", "did you mean 'reward_crop'?"),
        ("structure_weight=-1", "structure_weight"),
        ("structure_level=0", "structure_level"),
        ("structure_window=3", "structure_window"),
        ("structure_window=[0]", "structure_window"),
        ("text_dropout=2", "text_dropout"),
        ("ema=1", "ema"),
        ("rollout=noise", "rollout"),
        ("guidance=0.5", "guidance"),
        ("micro_batch=0", "micro_batch"),
        ("reward_crop=8", "reward_crop"),
    ],
)
def test_options_that_do_not_exist_or_fit(refused, tiny_base, hq_folder, tmp_path, option, says) -> None:
    assert says in refused(*line(tiny_base, hq_folder, tmp_path / "run", "--set", f"trainer_options.{option}"))


@pytest.mark.parametrize("window", ["[0,60]", "[-1,2]", "[3,2]", "[5,5]"])
@pytest.mark.parametrize("name", ["structure", "reward", "kl"])
def test_windows_outside_the_schedule(refused, upscaler, hq_folder, tmp_path, name, window) -> None:
    more = ("--set", f"trainer_options.{name}_window={window}")
    said = refused(*line(upscaler, hq_folder, tmp_path / "run", *more, adapter="sd_upscaler"))
    assert f"{name}_window" in said and "0 to 4" in said


def test_nothing_to_train_on(refused, tiny_base, hq_folder, tmp_path) -> None:
    more = ("--set", "trainer_options.structure_weight=0")
    assert "nothing to train on" in refused(*line(tiny_base, hq_folder, tmp_path / "run", *more, rewards="detail=0"))


@pytest.mark.parametrize("offline", ["switched off", "no connection"])
def test_vgg_weights_that_cannot_be_fetched(
    commands: Commands, contacted, tiny_base, hq_folder, tmp_path, monkeypatch, offline
) -> None:
    if offline == "no connection":
        monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    assert commands(*line(tiny_base, hq_folder, tmp_path / "run", "--dry-run")).code == 0  # pays for the imports
    connection.online.cache_clear()
    default = line(tiny_base, hq_folder, tmp_path / "run", "--set", "trainer_options.vgg=null")
    began = time.monotonic()
    answer = commands(*default)
    connection.online.cache_clear()
    assert time.monotonic() - began < 15  # the Hub's client alone would try for 23
    assert answer.code == 2 and answer.err.startswith("error: VGG19") and answer.err.count("\n") == 1, answer.err
    assert "trainer_options.vgg=FILE" in answer.err and "kl_weight=0" in answer.err
    assert len(contacted) == (offline == "no connection"), "one look whether there is a connection, no more"
    assert not (tmp_path / "run").exists()
    answer = commands(*default, "--set", "trainer_options.kl_weight=0")
    assert answer.code == 0, answer.err


def test_vgg_files_that_cannot_be_used(refused, tiny_base, hq_folder, tmp_path) -> None:
    whole = load_file(VGG)
    spoiled = tmp_path / "spoiled.safetensors"

    def said(path: Path) -> str:
        return refused(*line(tiny_base, hq_folder, tmp_path / "run", "--set", f"trainer_options.vgg={path}"))

    assert "no weights file" in said(tmp_path / "nowhere.pth")
    assert "no weights file" in said(tmp_path)
    for content in (VGG.read_bytes()[:1000], b""):
        spoiled.write_bytes(content)
        assert "damaged" in said(spoiled)
        (tmp_path / "spoiled.pth").write_bytes(content)
        assert "spoiled.pth" in said(tmp_path / "spoiled.pth")
    first = next(name for name in whole if name.endswith("weight"))
    save_file({name: value for name, value in whole.items() if name != first}, spoiled)
    assert "expected VGG19's 16 convolutions" in said(spoiled)
    save_file(whole | {first: whole[first][:, :2].contiguous()}, spoiled)
    assert "1 of another shape or type (features.0.weight, ...)" in said(spoiled)
    save_file(whole | {first: whole[first] * torch.nan}, spoiled)
    assert "not finite" in said(spoiled)
    torch.save([whole], tmp_path / "list.pth")
    assert "holds no state dict" in said(tmp_path / "list.pth")


# ---- the judged window ----


def test_a_judged_window_off_the_grid_or_larger_than_the_crop(refused, tiny_base, hq_folder, tmp_path) -> None:
    for crop, says in ((18, "multiple of 4"), (36, "data.crop is 32"), (64, "data.crop is 32")):
        assert says in refused(*line(tiny_base, hq_folder, tmp_path / "run", "--reward-crop", crop))


def test_a_judged_window_too_small_for_a_term(refused, tiny_base, hq_folder, tmp_path) -> None:
    more = ("--reward-crop", 16, "--set", "trainer_options.structure_level=5")
    assert "structure_level 5" in refused(*line(tiny_base, hq_folder, tmp_path / "run", *more))


def test_crops_too_small_for_a_term(refused, tiny_base, hq_folder, tmp_path) -> None:
    small = ("--set", "data.crop=12")
    assert "style distance needs 16 pixels" in refused(*line(tiny_base, hq_folder, tmp_path / "run", *small))


def test_a_judged_window_is_no_option_of_gdpo(commands: Commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    said = refused.finetune(tiny_base, hq_folder, tmp_path / "run", "--reward-crop", 16)
    assert "unknown key 'reward_crop'" in said
    answer = commands(*line(tiny_base, hq_folder, tmp_path / "run", "--reward-crop", 16))
    assert answer.code == 0, answer.err
