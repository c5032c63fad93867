"""Runs whose data is made in threads: the same run whatever their number, and files checked once among processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import ENVIRONMENT, PATIENCE, assert_equal_runs, content

import rewardsr
from rewardsr import UserError
from rewardsr.options import parse
from rewardsr.testing import write_images
from rewardsr.train.prepare import open_folders
from rewardsr.train.recipe import Recipe, differences


@pytest.fixture
def recipe(folder, tmp_path) -> Callable[..., dict]:
    return lambda output="run", **changes: content(folder, str(folder / "base"), str(tmp_path / output), **changes)


@pytest.mark.parametrize("name", ["light", "realesrgan"])
def test_the_number_of_threads_changes_nothing_and_may_change_on_a_resume(name, recipe, tmp_path) -> None:
    plain = {"steps": 4, "accumulate": 2, "batch_size": 2, "optimiser": {"schedule": "constant"}}
    data = {"degradation": {"name": name}}
    rewardsr.finetune(recipe("straight", **plain, data=data | {"workers": 0}))
    rewardsr.finetune(recipe(**plain | {"steps": 2}, data=data | {"workers": 3}))
    rewardsr.finetune(recipe(**plain, data=data | {"workers": 1}), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_threads_make_no_other_run_and_have_bounds(recipe) -> None:
    one, other = (parse(Recipe, recipe(data={"workers": number}), "test") for number in (None, 5))
    assert differences(one, other) == []
    for number in (-1, 65, "many", True):
        with pytest.raises(UserError, match=r"data\.workers"):
            parse(Recipe, recipe(data={"workers": number}), "test")
    for number, expected in ((0, 0), (5, 5)):
        train, _ = open_folders(parse(Recipe, recipe(data={"workers": number}), "test"), 4)
        assert train._workers._count == expected
    assert open_folders(one, 4)[0]._workers._count >= 1


@pytest.mark.parametrize("role", ["train", "validation"])
def test_a_dry_run_decodes_what_a_step_takes_and_a_run_everything(role, recipe, tmp_path) -> None:
    images = write_images(tmp_path / "many", 8, 24)
    chosen = parse(Recipe, recipe(data={"train": str(images)}), "test")
    used = open_folders(chosen, 4)[0].item(chosen.seed, 0).hq
    bad = next(path for path in sorted(images.iterdir(), reverse=True) if path != used)
    bad.write_bytes(bad.read_bytes()[:200])
    data = {role: str(images), "validation_limit": 8}
    rewardsr.finetune(recipe(data=data, batch_size=1), dry_run=True)
    with pytest.raises(UserError, match=rf"1 of 8 images are unreadable.*{bad.name}"):
        rewardsr.finetune(recipe(data=data))
    if role == "validation":  # what is not looked at may be anything
        assert rewardsr.finetune(recipe(steps=1, data=data | {"validation_limit": 2})).finished


SHARED = """
import json, sys
from functools import partial
import torch
from rewardsr.data import loader
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data
from rewardsr.evaluation.protocol import everywhere
from rewardsr.train.processes import make_accelerator

accelerator = make_accelerator(torch.device("cpu"))
rank, read, seen = accelerator.process_index, loader.read_pixels, []
loader.read_pixels = lambda path: (seen.append(path.name), read(path))[1]
data = open_data(sys.argv[1], scale=4, crop=16, degradation=Light(LightOptions(), 4), workers=2)
try:
    data.check(rank, accelerator.num_processes, together=partial(everywhere, accelerator))
    said = ""
except ValueError as error:
    said = str(error)
with open(f"{sys.argv[2]}/{rank}", "w") as file:
    json.dump([sorted(seen), said], file)
"""


def test_processes_share_the_check_and_all_end_with_one_line(tmp_path) -> None:
    images = write_images(tmp_path / "images", 5, 24)
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:200])
    (tmp_path / "shared.py").write_text(SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "shared.py"), str(images), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(Path(tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [seen for seen, _ in found] == [["000.png", "002.png", "004.png"], ["001.png", "003.png"]]
    assert found[0][1] == found[1][1] and "1 of 5 images are unreadable" in found[0][1]
    assert "003.png" in found[0][1]
