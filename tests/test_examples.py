"""The examples: short, right by our own checks, and running through `finetune` by `module:Name`."""

from pathlib import Path

import pytest
import yaml
from _support import Commands
from diffusers import DDPMScheduler, UNet2DModel

from rewardsr import Recipe
from rewardsr.options import parse
from rewardsr.pipelines import adapter_options, load_adapter
from rewardsr.plugins import resolve
from rewardsr.rewards import build
from rewardsr.run_folder import LORA, RECIPE
from rewardsr.testing import check_adapter, check_reward
from rewardsr.train import recipe as recipes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = sorted([*EXAMPLES.glob("*.yaml"), *(ROOT / "rewardsr" / "demo").glob("*.yaml")])


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch) -> None:
    """Where their headers say that the commands run: `module:Name` looks in the current folder."""
    monkeypatch.chdir(EXAMPLES)


def test_the_custom_adapter_keeps_the_contract(tiny_base) -> None:
    check_adapter(load_adapter("custom_adapter:Mixed", str(tiny_base), share=0.4))


def test_the_adapter_from_scratch_keeps_the_contract(tmp_path) -> None:
    unet = UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    check_adapter(load_adapter("adapter_from_scratch:SR3", tmp_path, steps=3))


def test_the_custom_reward_keeps_the_contract() -> None:
    check_reward(build("custom_reward:Contrast"))


@pytest.mark.parametrize("name", ["custom_adapter.py", "custom_reward.py"])
def test_they_are_short(name) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 40


def test_they_train_together(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    answer = commands.finetune(
        tiny_base,
        hq_folder,
        tmp_path / "run",
        *("--adapter", "custom_adapter:Mixed", "--set", 'adapter_options={"share": 0.4}'),
        rewards="psnr=0.5,custom_reward:Contrast=0.5",
    )
    assert answer.code == 0, answer.err
    assert (tmp_path / "run" / LORA).is_file()
    assert "custom_reward:Contrast" in (tmp_path / "run" / "metrics.jsonl").read_text()
    answer = commands("upscale", hq_folder / "000.png", "--run", tmp_path / "run", "-o", tmp_path / "out")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_to_the_last_key(path) -> None:
    # The demo fills in where its photographs and its output are.
    places = {"data.train": "photographs", "output": "somewhere"} if path.parent.name == "demo" else {}
    read = recipes.load_recipe(str(path), places, [])
    assert isinstance(read, Recipe)
    parse(resolve("trainers", read.trainer).Options, read.trainer_options, path.name)
    adapter_options(read.adapter, read.adapter_options)
    assert parse(Recipe, yaml.safe_load(recipes.to_yaml(read)), RECIPE) == read, "written out it is the same"
