"""Runs on other images than a folder of large HQ images: LQ images alone, several sources, small images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import content, lines, weights

import rewardsr
from rewardsr.errors import UserError
from rewardsr.run_folder import RECIPE
from rewardsr.testing import write_images
from rewardsr.train.recipe import load_recipe

SEES_LQ = {"rewards": [{"name": "sharpness"}, {"name": "lq_consistency"}], "guards": ["lq_consistency"]}


@pytest.fixture
def recipe(folder, tmp_path) -> Callable[..., dict]:
    def made(output: str = "run", **changes: object) -> dict:
        return content(folder, str(folder / "base"), output=str(tmp_path / output), **changes)

    return made


@pytest.fixture
def lq_folder(tmp_path) -> Path:
    return write_images(tmp_path / "only" / "lq", 3, 16).parent


def test_a_run_without_targets(recipe, lq_folder, commands) -> None:
    data = {"train": str(lq_folder), "validation": str(lq_folder)}
    made = recipe(steps=2, data=data, **SEES_LQ)
    result = rewardsr.finetune(made)
    assert result.finished and set(result.validation) == {"sharpness", "lq_consistency"}
    assert any("validation" in line for line in lines(Path(made["output"])))
    answer = commands("evaluate", lq_folder, "--run", made["output"], "--metrics", "sharpness", "--device", "cpu")
    assert answer.code == 0 and f"3 LQ images in '{lq_folder}'" in answer.out, answer.err
    answer = commands("evaluate", lq_folder, "--run", made["output"], "--metrics", "psnr", "--device", "cpu")
    assert answer.code == 2 and "psnr compare with an HQ image" in answer.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": [{"name": "psnr"}, {"name": "sharpness"}]},
            "reward psnr: needs HQ images, and data.train has 3 LQ",
        ),
        (
            {"trainer_options": {"weighting": "attribute"}},
            r"weighting 'attribute' \(trainer_options\.weighting\): needs HQ images",
        ),
        (
            {"trainer": "rfsr", "trainer_options": {"kl_weight": 0}},
            r"the structure term \(trainer_options\.structure_weight\): needs HQ images",
        ),
        ({"trainer": "naosd", "trainer_options": {}, "rewards": []}, "supervised training: needs HQ images"),
        ({"guards": ["ssim", "psnr"]}, "ssim, psnr compare with HQ images, and data.validation has 3 LQ images in"),
    ],
)
def test_what_needs_targets_is_refused_before_the_pipeline_is_loaded(
    changes, message, recipe, lq_folder, tmp_path, monkeypatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the pipeline is loaded")

    monkeypatch.setattr("rewardsr.train.prepare.load_adapter", loaded)
    made = recipe(data={"train": str(lq_folder), "validation": str(lq_folder)}, **{**SEES_LQ, **changes})
    if changes.get("trainer"):
        made["trainer_options"] = changes["trainer_options"]
    with pytest.raises(UserError, match=message):
        rewardsr.finetune(made)
    assert not Path(made["output"]).exists()


def test_prompts_are_left_empty_in_one_place_only(recipe, lq_folder) -> None:
    changes = {"trainer": "rfsr", "trainer_options": {"structure_weight": 0, "kl_weight": 0}, **SEES_LQ}
    made = recipe(data={"train": str(lq_folder), "prompts": "a photo", "prompt_dropout": 0.1}, **changes)
    made["trainer_options"] = changes["trainer_options"]
    with pytest.raises(UserError, match=r"trainer 'rfsr' leaves prompts empty itself .*text_dropout is 0\.5"):
        rewardsr.finetune(made)


def test_several_sources_resume_to_the_bit_and_with_the_same_shares_only(recipe, tmp_path) -> None:
    folders = [write_images(tmp_path / name, count, 48) for name, count in (("many", 4), ("few", 1))]

    def sources(*shares: float) -> list[dict]:
        return [{"path": str(folder), "probability": share} for folder, share in zip(folders, shares, strict=True)]

    plain = {"optimiser": {"schedule": "constant", "warmup": 0}}
    data = {"train": sources(0.5, 0.5), "prompts": "a photo", "prompt_dropout": 0.5}
    rewardsr.finetune(recipe(output="whole", steps=3, data=data, **plain))
    rewardsr.finetune(recipe(steps=1, data=data, **plain))
    kept = load_recipe(str(tmp_path / "run" / RECIPE), {}, [])
    assert [source.probability for source in kept.data.train] == [0.5, 0.5]
    with pytest.raises(UserError, match=r"data\.train .* are not those that the run began with"):
        rewardsr.finetune(recipe(steps=3, data=data | {"train": sources(0.4, 0.6)}, **plain), resume=True)
    rewardsr.finetune(recipe(steps=3, data=data, **plain), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_small_images_are_padded_on_request(recipe, folder, caplog) -> None:
    made = recipe(steps=1, data={"crop": 64, "too_small": "pad", "max_unreadable": 0})
    assert rewardsr.finetune(made).finished
    with pytest.raises(UserError, match="is as large as the crop of 64"):
        rewardsr.finetune(recipe("other", steps=1, data={"crop": 64}))
