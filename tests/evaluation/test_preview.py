"""`rewardsr data preview`: a grid of HQ images, each beside LQ images that a degradation made of it."""

import pytest
import torch
from torch.nn.functional import interpolate

from rewardsr.data.degrade.contract import in_words, make_degradation
from rewardsr.data.folder import open_data
from rewardsr.data.images import read_image
from rewardsr.evaluation.pictures import grid
from rewardsr.testing import write_images
from rewardsr.train.recipe import DegradationRecipe

LIGHT = {"name": "light", "blur": [2.0, 2.0], "noise": [9.0, 9.0]}


def expected(folder, section, scale=4, side=256, images=2, draws=3, seed=0):
    """The grid, made of what validation shows with the same seeds."""
    degradation = make_degradation(DegradationRecipe.model_validate(section), scale)
    rows = []
    for place in range(images):
        row = []
        for drawn in range(draws):
            data = open_data(folder, scale=scale, degradation=degradation)
            batch = list(data.validation(images, seed + drawn, side))[place]
            row.append((f"LQ, seed {seed + drawn}", interpolate(batch.lq, scale_factor=scale, mode="nearest")[0]))
        rows.append([(f"{data.items[place].hq.stem} HQ", batch.hq[0]), *row])
    return grid(rows)


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 3, 50)


def test_a_degradation_by_name_and_option(commands, photos, tmp_path) -> None:
    options = ("--degradation", "light", "--set", "blur=[2, 2]", "--set", "noise=[9, 9]")
    answer = commands("data", "preview", photos, "-o", tmp_path / "grid.png", *options, "--images", 2, "--draws", 3)
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(tmp_path / "grid.png")
    assert (read_image(tmp_path / "grid.png") - expected(photos, LIGHT)).abs().max() < 1e-6


def test_one_number_of_realesrgan(commands, photos, tmp_path) -> None:
    options = ("--degradation", "realesrgan", "--set", "second.noise=[0, 1]", "--scale", 2, "--seed", 7, "--side", 32)
    answer = commands("data", "preview", photos, "-o", tmp_path / "grid.png", *options, "--images", 2, "--draws", 3)
    assert answer.code == 0, answer.err
    section = {"name": "realesrgan", "second": {"noise": [0, 1]}}
    wanted = expected(photos, section, scale=2, seed=7, side=32)
    off = (read_image(tmp_path / "grid.png") - wanted).abs() * 255
    assert off.mean() < 0.1
    assert not torch.equal(wanted, expected(photos, {"name": "realesrgan"}, scale=2, seed=7, side=32))


def test_a_recipe_and_the_folder_of_a_run(commands, photos, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(
        "base: b\nrewards: [{name: psnr}]\noutput: o\nsteps: 1\nadapter_options: {scale: 2}\n"
        "data: {train: t, degradation: {name: light, blur: [2, 2], noise: [9, 9]}}\n"
    )
    for source in (recipe, recipe.parent):
        for more, section in (
            ((), LIGHT),
            (("--set", "noise=[1, 1]"), LIGHT | {"noise": [1, 1]}),
            (("--degradation", "light"), LIGHT),
            (("--degradation", "bicubic"), {"name": "bicubic"}),
        ):
            where = tmp_path / "grid.png"
            answer = commands(
                "data", "preview", photos, "-o", where, "--recipe", source, "--images", 2, "--draws", 3, *more
            )
            assert answer.code == 0, answer.err
            assert (read_image(where) - expected(photos, section, scale=2)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--degradation", "realesrgam"), "unknown degradation 'realesrgam': did you mean 'realesrgan'"),
        (("--degradation", "realesrgan", "--set", "first.nose=[1, 2]"), "unknown key 'first.nose': did you mean"),
        (("--degradation", "realesrgan", "--set", "first.noise=[2, 1]"), "expected the lower end of a range first"),
        (("--set", "first.noise=[2, 1]"), "unknown key 'first'"),
        (("--set", "noise"), "--set noise: expected key=value"),
        (("--set", "name=[1]"), "'name' is [1]"),
        (("--degradation", "none"), "leaves images at their size, and the scale is 4"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--side", 2), "expected at least the scale, 4"),
    ],
)
def test_mistakes(refused, photos, tmp_path, options, message) -> None:
    assert message in refused("data", "preview", photos, "-o", tmp_path / "new" / "grid.png", *options)


def test_places_that_are_none(refused, photos, tmp_path) -> None:
    assert "let the name end in .png" in refused("data", "preview", photos, "-o", tmp_path / "grid.jpg")
    assert "no data folder" in refused("data", "preview", tmp_path / "nothing", "-o", tmp_path / "grid.png")
    write_images(tmp_path / "pairs" / "gt", 1, 48)
    write_images(tmp_path / "pairs" / "lq", 1, 12)
    said = refused("data", "preview", tmp_path / "pairs", "-o", tmp_path / "grid.png")
    assert "holds pairs, which are not degraded" in said
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: b\nrewards: [{name: psnr}]\noutput: o\nsteps: 1\nadapter_options: {scale: two}\ndata: {train: t}\n"
    )
    said = refused("data", "preview", photos, "-o", tmp_path / "grid.png", "--recipe", recipe)
    assert "adapter_options.scale is 'two', expected a whole number" in said


def test_a_degradation_in_words() -> None:
    def words(**section) -> str:
        return in_words(DegradationRecipe.model_validate(section))

    assert words() == "light" and words(name="realesrgan", first={"gray": 0.4}) == "realesrgan"
    assert words(name="light", noise=[9, 9], quality=[75, 97]) == "light, noise=[9.0, 9.0]"
    assert words(name="realesrgan", kernel={"sinc": 0}, second={"gray": 1}) == (
        "realesrgan, kernel.sinc=0.0, second.gray=1.0"
    )
