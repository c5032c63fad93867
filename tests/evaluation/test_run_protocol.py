"""What is done with a run later goes by its protocol: evaluating and upscaling see what its own validation saw."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from _support import Commands

import rewardsr
from rewardsr import Draws, lora
from rewardsr.data.images import read_image, to_uint8
from rewardsr.evaluation.report import Evaluation
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.pipelines import open_run
from rewardsr.run_folder import RECIPE, VALIDATION
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train.recipe import ProtocolRecipe

CPU = ("--device", "cpu")  # as the runs were
HARSH = {"name": "light", "blur": [3.0, 3.0], "noise": [20.0, 20.0], "quality": [40, 40]}


class Bright:
    """A captioner that says how bright an image is."""

    def __call__(self, lq: torch.Tensor) -> list[str]:
        return [f"light of {float(image.mean()):.3f} and shade" for image in lq]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Images with prompts beside them, a pipeline, and runs of one step that differ in their protocol alone."""
    folder = tmp_path_factory.mktemp("protocol")
    write_images(folder / "images", count=3, size=48)
    for path in sorted((folder / "images").glob("*.png")):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
        with (folder / "images" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": path.name, "words": f"the words of {path.stem}"}) + "\n")
    tiny_pipeline(folder / "base")
    protocols = {
        "plain": {},
        "harsh": {"degradation": HARSH, "validation_side": 32},
        "published": {"degradation": {"name": "realesrgan", "second": {"noise": [0, 3]}}},
        "sidecar": {"prompts": "sidecar"},
        "captioned": {"prompts": "captioner", "captioner": "test_run_protocol:Bright"},
        "fixed": {"prompts": "a photograph of a dog"},
        "metadata": {"prompts": "metadata", "caption_column": "words", "prompt_suffix": "sharp"},
    }
    for name, protocol in protocols.items():
        data = {"train": str(folder / "images"), "validation": str(folder / "images"), "crop": 32, **protocol}
        rewardsr.finetune(
            {
                "base": str(folder / "base"),
                "adapter_options": {"noise_t": 250},
                "rewards": [{"name": "psnr"}],
                "guards": ["ssim"],
                "data": data,
                "trainer_options": {"group_size": 2},
                "output": str(folder / name),
                "steps": 1,
                "seed": 5,
                "device": "cpu",
            }
        )
    return folder


@pytest.mark.parametrize("name", ["plain", "harsh", "published", "sidecar", "captioned", "fixed", "metadata"])
def test_evaluating_a_run_finds_what_its_validation_found(name, made, commands: Commands, tmp_path) -> None:
    answer = commands("evaluate", made / "images", "--run", made / name, *CPU, "-o", tmp_path / "found")
    assert answer.code == 0, answer.err
    own = Evaluation.read(made / name / VALIDATION / "step-00000001.json")
    found = Evaluation.read(tmp_path / "found" / "evaluation.json")
    assert (found.images, found.seed) == (own.images, own.seed)
    assert list(found.scores.values()) == list(own.scores.values()) and list(found.scores) == ["base", name]
    said = {
        "harsh": "noise=[20.0, 20.0]",
        "published": "LQ images: realesrgan, second.noise=[0.0, 3.0]; prompts: adapter",
    }
    assert said.get(name, "") in answer.out
    if name in said:
        other = Evaluation.read(made / "plain" / VALIDATION / "step-00000001.json")
        assert own.scores["base"]["psnr"] != pytest.approx(other.scores["base"]["psnr"], abs=0.02)


def test_options_of_the_command_go_before_the_runs_protocol(made, commands: Commands, tmp_path) -> None:
    def scores(name: str, *options: object) -> list:
        folder = tmp_path / "-".join(map(str, (name, *options)))
        command = ("evaluate", made / "images", "--run", made / name, *options, *CPU, "-o", folder)
        assert commands(*command).code == 0
        return list(Evaluation.read(folder / "evaluation.json").scores.values())

    bare = scores("captioned", "--prompts", "adapter")  # the same base, and a LoRA of its own
    assert bare[0] == scores("plain")[0] != scores("captioned")[0]
    assert scores("plain", "--seed", 6) != scores("plain") == scores("plain", "--seed", 5)
    assert scores("harsh", "--side", 48) != scores("harsh")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("plain", lambda path: ""),
        ("sidecar", lambda path: f"a picture called {path.stem}"),
        ("captioned", lambda path: Bright()(read_image(path)[None])[0]),
        ("fixed", lambda path: "a photograph of a dog"),
        ("metadata", lambda path: f"the words of {path.stem}, sharp"),
    ],
)
def test_upscaling_with_a_run_prompts_as_it_did(name, prompt, made, commands: Commands, tmp_path) -> None:
    answer = commands("upscale", made / "images", "--run", made / name, *CPU, "-o", tmp_path)
    assert answer.code == 0, answer.err
    adapter, _ = open_run(str(made / name), device="cpu")
    differing = 0
    for index, path in enumerate(sorted((made / "images").glob("*.png"))):
        image, noise = read_image(path)[None], [Draws(0, 0, [index], "upscale") for _ in range(2)]
        expected = upscale_tensor(adapter, image, [prompt(path)], noise[0])
        assert torch.equal(to_uint8(read_image(tmp_path / path.name)), to_uint8(expected[0]))
        differing += not torch.equal(to_uint8(expected), to_uint8(upscale_tensor(adapter, image, ["x"], noise[1])))
    assert differing, "prompts make a difference here"


def test_a_run_computes_in_its_precision(made, tmp_path) -> None:
    run = shutil.copytree(made / "plain", tmp_path / "run")
    recipe = yaml.safe_load((run / RECIPE).read_text())
    (run / RECIPE).write_text(yaml.safe_dump(recipe | {"precision": "bf16"}))
    assert open_run(str(run), device="cpu")[0].dtype == torch.bfloat16
    assert open_run(str(run), device="cpu", precision="fp32")[0].dtype == torch.float32


def test_the_api_takes_a_protocol(made) -> None:
    adapter, recipe = open_run(str(made / "harsh"), device="cpu")
    assert recipe is not None
    found = rewardsr.evaluate(adapter, made / "images", ["psnr"], seed=5, side=32, protocol=recipe.data)
    own = Evaluation.read(made / "harsh" / VALIDATION / "step-00000001.json")
    assert found.rewards["psnr"] == own.rewards["psnr"]
    plain = rewardsr.evaluate(adapter, made / "images", ["psnr"], seed=5, side=32)
    assert plain.rewards["psnr"].base != found.rewards["psnr"].base
    same = rewardsr.evaluate(adapter, made / "images", ["psnr"], protocol=ProtocolRecipe(prompts="sidecar"))
    again = rewardsr.evaluate(adapter, made / "images", ["psnr"], prompts="sidecar")
    assert same.scores == again.scores
    assert lora.attached(adapter)
