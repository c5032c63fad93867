"""Metrics are tried before training on what they will see: on crops to steer, on whole images to watch."""

import pytest
import torch
from runs import content, lines

import rewardsr
from rewardsr import UserError
from rewardsr.testing import tiny_pipeline, write_images

WIDE = "test_tried:Wide"


class Wide:
    """A metric that needs 40 pixels, as windows of patches do."""

    name, kind, licence = "wide", "detail", "Apache-2.0"
    needs_hq, differentiable = False, True

    def __call__(self, sr: torch.Tensor, batch: rewardsr.Batch) -> torch.Tensor:
        if min(sr.shape[-2:]) < 40:
            raise ValueError("40 pixels are needed")
        return sr.mean((1, 2, 3))


@pytest.fixture
def recipe(tmp_path):
    """One step on crops of 16 pixels; held-out images of 48."""
    write_images(tmp_path / "images", count=2, size=24)
    write_images(tmp_path / "held_out", count=2, size=48)
    tiny_pipeline(tmp_path / "base")

    def make(**changes) -> dict:
        data = {"validation": str(tmp_path / "held_out")} | changes.pop("data", {})
        return content(tmp_path, str(tmp_path / "base"), steps=1, data=data, **changes)

    return make


@pytest.mark.parametrize("watch", [{"guards": [WIDE]}, {"rewards": [{"name": "psnr"}, {"name": WIDE, "weight": 0}]}])
def test_what_watches_need_not_take_a_crop(watch, recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(**watch))
    assert WIDE in lines(tmp_path / "run")[-1]["validation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guards": [WIDE], "data": {"validation_side": 32}}, r"the smallest held-out image \(32x32 pixels\)"),
        ({"rewards": [{"name": WIDE}]}, r"a training crop \(16x16 pixels\)"),
    ],
)
def test_what_will_not_do_is_refused_before_training(change, message, recipe, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"reward '{WIDE}' fails on {message}: ValueError: 40 pixels are needed"):
        rewardsr.finetune(recipe(**change))
    assert not (tmp_path / "run").exists()


def test_the_smallest_of_the_held_out_images_is_tried(recipe, tmp_path) -> None:
    small = write_images(tmp_path / "small", count=1, size=36)
    (small / "000.png").rename(tmp_path / "held_out" / "zzz.png")
    with pytest.raises(UserError, match=r"the smallest held-out image \(36x36 pixels\)"):
        rewardsr.finetune(recipe(guards=[WIDE]))
    rewardsr.finetune(recipe(guards=[WIDE], data={"validation_limit": 2}))


def test_without_held_out_images_nothing_watches(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(guards=[WIDE], data={"validation": None}))
    assert len(lines(tmp_path / "run")) == 1
