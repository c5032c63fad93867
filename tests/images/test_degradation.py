"""Degradations: the built-in ones, those of others, and how a recipe names them."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rewardsr.data.degrade.contract import degradation_options, make_degradation
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.degrade.plain import Bicubic
from rewardsr.errors import UserError
from rewardsr.options import Options
from rewardsr.testing import write_images
from rewardsr.train.prepare import complete
from rewardsr.train.recipe import DegradationRecipe, differences, load_recipe


def hq() -> Tensor:
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(1))
    return image.repeat_interleave(2, 1).repeat_interleave(2, 2)[None]


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds or (5,)]


# ---- the built-in ones ----


@pytest.mark.parametrize(
    ("options", "scale", "digest"),  # of 0.1.0
    [
        ({}, 4, "1e6c346e830cbf7c"),
        ({}, 1, "d6a8dd2b76c33644"),
        ({"blur": (0.7, 0.7), "noise": (2.0, 2.0), "quality": (90, 90)}, 4, "5c5f7b72e050acd6"),
        ({"blur": (0, 0), "noise": (0, 0), "quality": (100, 100)}, 2, "31d3db39b0c5ca06"),
    ],
)
def test_light_draws_as_it_always_did(options: dict[str, Any], scale: int, digest: str) -> None:
    lq = Light(LightOptions(**options), scale)(hq(), draws())
    levels = (lq * 255).round().to(torch.uint8)
    assert torch.equal(levels.float() / 255, lq)
    assert hashlib.sha256(levels.numpy().tobytes()).hexdigest().startswith(digest)


def test_bicubic_is_antialiased_and_draws_nothing() -> None:
    random = draws()
    before = random[0].get_state()
    lq = make_degradation(DegradationRecipe(name="bicubic"), 4)(hq(), random)
    smooth = interpolate(hq(), scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    assert (lq - smooth).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(random[0].get_state(), before)


@pytest.mark.parametrize("kind", [Light(LightOptions(), 4), Bicubic(Options(), 4)])
@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(1, 3, 8, 8).double(),
        torch.zeros(1, 3, 8, 10),
        torch.full((1, 3, 8, 8), 1.1),
        torch.full((1, 3, 8, 8), torch.nan),
    ],
)
def test_images_that_are_none(kind: Any, image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) float32 in \[0, 1\], H and W multiples of 4, got"):
        kind(image, draws())


def test_a_generator_for_each_image() -> None:
    with pytest.raises(ValueError, match="generators: expected one for each of 2 images, got 1"):
        Light(LightOptions(), 4)(hq().repeat(2, 1, 1, 1), draws())


def test_none_leaves_images_as_they_are() -> None:
    assert torch.equal(make_degradation(DegradationRecipe(name="none"), 1)(hq(), draws()), hq())


# ---- by name ----


def test_a_strangers_degradation() -> None:
    section = DegradationRecipe.model_validate({"name": "strangers:Dimmed", "factor": 0.25})
    assert torch.equal(make_degradation(section, 2)(hq(), draws()), hq()[..., ::2, ::2] * 0.25)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "lihgt"}, "unknown degradation 'lihgt': did you mean 'light'"),
        ({"qualty": [80, 90]}, "data.degradation (light): unknown key 'qualty': did you mean 'quality'?"),
        ({"name": "bicubic", "blur": [0, 1]}, "data.degradation (bicubic): unknown key 'blur': known: none"),
        ({"quality": [0, 90]}, "'quality.0' is 0"),
        ({"quality": [80.5, 90]}, "'quality.0' is 80.5"),
        ({"blur": [2, 1]}, "'blur' is [2, 1]: expected the lower end of a range first"),
        ({"noise": [-1, 1]}, "'noise.0' is -1"),
        ({"noise": [0, float("inf")]}, "'noise.1' is inf"),
        ({"name": "strangers:Dimmed", "factr": 1}, "unknown key 'factr': did you mean 'factor'?"),
        ({"name": "strangers:NUMBER"}, "expected a class that is made as Kind(options, scale)"),
        ({"name": "strangers:LooseOptions"}, "Options are a subclass of rewardsr.Options"),
        ({"name": "strangers:untagged"}, "degradation 'strangers:untagged' fails on images of noise: TypeError"),
        ({"name": "strangers:Unshrunk"}, "must make float32 images (2, 3, 32, 32) in [0, 1] of (2, 3, 64, 64), not"),
        ({"name": "strangers:Overshooting"}, "not torch.float32 (2, 3, 32, 32) in ["),
        ({"name": "strangers:Unseeded"}, "must take all randomness from its generators: two calls"),
        ({"name": "strangers:Sharing"}, "must make each image with its own generator"),
        ({"name": "none"}, "degradation 'none' leaves images at their size, and the scale is 2: choose bicubic"),
    ],
)
def test_mistakes(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_degradation(DegradationRecipe.model_validate(section), 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- in a recipe ----


def test_recipes_of_0_1_0_are_the_same_run(tmp_path) -> None:
    def recipe(degradation: str):
        data = f"data: {{train: photos{degradation}}}\n"
        (tmp_path / "recipe.yaml").write_text(f"base: b\nrewards: [{{name: psnr}}]\n{data}output: run\nsteps: 3\n")
        return complete(load_recipe(str(tmp_path / "recipe.yaml"), {}, []))

    plain = recipe("")
    written = {"name": "light", "blur": [0.2, 1.2], "noise": [0.0, 4.0], "quality": [75, 97]}
    assert degradation_options(plain.data.degradation) == plain.data.degradation.model_dump() == written
    for same in (
        ", degradation: {blur: [0.2, 1.2], noise: [0.0, 4.0], quality: [75, 97]}",
        ", degradation: {name: light, noise: [0, 4]}",
    ):
        assert differences(plain, recipe(same)) == []
    assert differences(plain, recipe(", degradation: {name: bicubic}")) == ["data"]


def test_a_run_names_its_degradation(commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    pairs = write_images(tmp_path / "pairs" / "lq", 2, 12).parent
    write_images(pairs / "gt", 2, 48)
    for data in (hq_folder, pairs):
        said = refused.finetune(tiny_base, data, tmp_path / "run", "--set", "data.degradation.name=bicubc")
        assert "did you mean 'bicubic'" in said
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", "--set", "data.degradation.name=bicubic")
    assert answer.code == 0, answer.err
    assert "degradation:\n    name: bicubic\n" in (tmp_path / "run" / "recipe.yaml").read_text()
