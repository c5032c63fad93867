"""Bases, released checkpoints and LoRAs that cannot be used: one clear line, exit code 2, none of their code runs."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from _support import Commands
from safetensors.torch import load_file, save_file

from rewardsr.testing import tiny_pipeline

pytestmark = pytest.mark.usefixtures("contacted")


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """A copy of the tiny pipeline that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(config: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


# ---- base ----


def test_base_that_is_not_there(refused, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert "no such folder" in refused.finetune(tmp_path / "nowhere", hq_folder, run)
    assert "no folder 'unet/'" in refused.finetune(hq_folder, hq_folder, run)
    assert "is a file" in refused.finetune(hq_folder / "000.png", hq_folder, run)
    assert "--run FOLDER" in refused("upscale", hq_folder, "-o", run)
    assert "recipe.yaml" in refused("upscale", hq_folder, "-o", run, "--run", tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_base_without_a_part(refused, base, hq_folder, tmp_path, part) -> None:
    shutil.rmtree(base / part)
    assert f"'{part}/'" in refused.finetune(base, hq_folder, tmp_path / "run")


def test_base_with_damaged_weights(refused, base, hq_folder, tmp_path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        weights.write_bytes(content)
        assert "unet" in refused.finetune(base, hq_folder, tmp_path / "run")
    weights.unlink()
    assert "unet" in refused.finetune(base, hq_folder, tmp_path / "run")


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_base_that_lacks_a_tensor(refused, base, hq_folder, tmp_path, part, file) -> None:
    """The libraries would draw it at random, with a warning."""
    path = base / part / f"{file}.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != name}, path, {"format": "pt"})
    line = refused.finetune(base, hq_folder, tmp_path / "run")
    assert f"{part}' lacks " in line and name.removeprefix("text_model.") in line


def test_base_of_another_family(refused, tiny_seesr, hq_folder, tmp_path) -> None:
    """The libraries would leave out what plain Stable Diffusion does not have, with a warning."""
    stablesr = tiny_pipeline(tmp_path / "stablesr", family="stablesr")
    for folder, name in ((stablesr, ".spade."), (tiny_seesr, ".image_attentions.")):
        line = refused.finetune(folder, hq_folder, tmp_path / "run")
        assert "is no plain UNet2DConditionModel" in line and name in line


def test_base_whose_parts_do_not_fit(refused, base, hq_folder, tmp_path) -> None:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=16, norm_num_groups=4, layers_per_block=1
    ).save_pretrained(base / "vae")
    assert "UNet gives 4 channels, but the latents have 16" in refused.finetune(base, hq_folder, tmp_path / "run")
    wide = CLIPTextConfig(vocab_size=514, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    wide.num_attention_heads = 2
    CLIPTextModel(wide).save_pretrained(whole / "text_encoder")
    assert "32 wide, but the UNet attends to 16" in refused.finetune(whole, hq_folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("unet/config.json", {"_class_name": "UNet9DModel"}, "UNet9DModel"),
        ("unet/config.json", {"_class_name": "DDPMScheduler"}, "DDPMScheduler"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ("unet/config.json", {"cross_attention_dim": 24}, "unet"),
        ("vae/config.json", {"latent_channels": 8}, "vae"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction type 'sample'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_base_of_another_shape(refused, base, hq_folder, tmp_path, part, values, says) -> None:
    change(base / part, **values)
    assert says in refused.finetune(base, hq_folder, tmp_path / "run")


def test_scheduler_of_another_kind(refused, base, hq_folder, tmp_path) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    assert "FlowMatchEulerDiscreteScheduler" in refused.finetune(base, hq_folder, tmp_path / "run")


def test_v_prediction_is_no_mistake(commands: Commands, base, hq_folder, tmp_path) -> None:
    change(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    answer = commands.finetune(base, hq_folder, tmp_path / "run")
    assert answer.code == 0, answer.err


# ---- pickles and LoRAs ----


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "plain"])
@pytest.mark.parametrize("role", ["weights", "lora", "init"])
def test_a_pickle_with_code_is_refused_and_not_run(refused, tiny_base, hq_folder, tmp_path, protocol, role) -> None:
    target, file = tmp_path / "made_by_the_pickle", tmp_path / "evil.pkl"
    content = {"state_dict_unet": {"conv_in.weight": Bomb(target)}, "rank_unet": 4}
    if protocol == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    upscale = ("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out")
    if role == "weights":
        said = refused(*upscale, "--option", f"weights={file}")
    elif role == "lora":
        said = refused(*upscale, "--lora", file)
    else:
        said = refused.finetune(tiny_base, hq_folder, tmp_path / "run", "--set", f"lora.init={file}")
    assert "evil.pkl" in said and "refused" in said
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # it would have worked
    assert target.is_dir()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": torch.zeros(2)}, "no 'state_dict_unet'"),
        ({"state_dict_unet": {"conv_in.lora_A.default_encoder.weight": 3}}, "is no tensor"),
        ({"state_dict_unet": [1]}, "expected tensors by name"),
        ({"state_dict_unet": {"conv_in.lora_A.default_encoder.weight": torch.zeros(4, 4, 3, 3)}}, "only one of"),
        ({"state_dict_unet": {"elsewhere.base_layer.weight": torch.zeros(2, 2)}}, "another base"),
        ({"state_dict_unet": {"conv_in.base_layer.weight": torch.full((2, 2), torch.nan)}}, "not finite"),
    ],
)
def test_a_pickle_of_something_else(refused, tiny_base, hq_folder, tmp_path, content, says) -> None:
    torch.save(content, tmp_path / "other.pkl")
    weights = ("--option", f"weights={tmp_path / 'other.pkl'}")
    assert says in refused("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out", *weights)


def test_loras_that_do_not_belong_here(commands: Commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    from rewardsr import load_adapter, lora
    from rewardsr.testing import tiny_pipeline

    adapter = load_adapter("osediff", str(tiny_pipeline(tmp_path / "other", seed=5)))
    lora.attach(adapter)
    lora.save(adapter, tmp_path / "lora")
    upscale = ("upscale", hq_folder, "--base", tiny_base, "-o", tmp_path / "out")
    assert "--force-base overrides" in refused(*upscale, "--lora", tmp_path / "lora")
    torch.save({"unet.conv_in.lora_A.weight": torch.zeros(4)}, tmp_path / "lora.bin")
    assert "pickles can run code" in refused(*upscale, "--lora", tmp_path / "lora.bin")
    assert "no LoRA at" in refused(*upscale, "--lora", tmp_path / "nowhere")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    assert "damaged" in refused(*upscale, "--lora", tmp_path / "bad.safetensors")
    (tmp_path / "no_run").mkdir()
    assert "carries no rewardsr LoRA" in refused(
        "export", tmp_path / "merged", "--format", "merged", "--base", tiny_base
    )
    assert "strength is nan" in refused(*upscale, "--lora", tmp_path / "lora", "--strength", "nan")
    assert commands(*upscale, "--lora", tmp_path / "lora", "--force-base").code == 0
