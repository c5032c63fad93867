"""The example of a reward that is hacked, in a few large steps on two photographs: it degrades, and is stopped."""

import json
from pathlib import Path

import rewardsr
from rewardsr.demo.photos import SOFT, write_folders
from rewardsr.run_folder import ENDING
from rewardsr.train.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "guards_embedded.yaml"


def test_sharpness_alone_degrades_and_is_stopped(tmp_path) -> None:
    write_folders(tmp_path / "photos", SOFT)
    quick = {
        "data.train": str(tmp_path / "photos" / "train"),
        "data.validation": str(tmp_path / "photos" / "val"),
        "data.validation_limit": 2,
        "cast_test": False,
        "output": str(tmp_path / "run"),
        "batch_size": 1,
        "validate_every": 1,
        "steps": 10,
        "trainer_options.ema": 0,
        "optimiser": {"learning_rate": 5e-3},
    }
    result = rewardsr.finetune(load_recipe(str(EXAMPLE), quick, []))
    assert result.stopped is not None and 0 < result.shipped < result.step < 10
    found = [
        json.loads((result.output / "validation" / f"step-{step:08d}.json").read_text())["systems"]["tuned"]
        for step in (result.shipped, result.step)
    ]
    shipped, last = ({name: entry["difference"] for name, entry in metrics.items()} for metrics in found)
    assert 0 < shipped["sharpness"] < last["sharpness"], "the reward rises"
    assert shipped["psnr"] > -1 and shipped["ssim"] > -0.05, "what is shipped is within the margins"
    assert last["psnr"] < -1 or last["ssim"] < -0.05 or last["periodic_pattern"] < -0.5, "what it came to is not"
    assert json.loads((result.output / ENDING).read_text())["shipped"] == result.shipped
