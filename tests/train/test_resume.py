"""What a resumed run may change, what it must not, and who may write into its folder."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import Brightness, content, lines, listing, weights

import rewardsr
from rewardsr import UserError
from rewardsr.run_folder import CHECKPOINTS, LOCK, METRICS, RECIPE, STATE
from rewardsr.testing import tiny_pipeline, write_images


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images and a tiny pipeline of the test's own."""
    write_images(tmp_path / "images", count=3, size=24)
    tiny_pipeline(tmp_path / "base")
    return tmp_path


@pytest.fixture
def recipe(folder) -> Callable[..., dict]:
    return lambda **changes: content(folder, str(folder / "base"), **changes)


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


# ---- more steps ----


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_a_run_that_gets_more_steps_ends_like_a_straight_one(checkpoint_every, recipe, folder, caplog) -> None:
    plain = {"optimiser": {"schedule": "constant", "warmup": 0}, "checkpoint_every": checkpoint_every}
    rewardsr.finetune(recipe(output="straight", steps=4, **plain))
    rewardsr.finetune(recipe(steps=2, **plain))
    with caplog.at_level(logging.INFO, "rewardsr"):
        result = rewardsr.finetune(recipe(steps=4, **plain), resume=True)
    assert (result.step, result.finished) == (4, True)
    assert "the run ends at step 4, not 2" in caplog.messages
    assert same(folder / "run", folder / "straight")
    assert lines(folder / "run") == lines(folder / "straight")
    assert yaml.safe_load((folder / "run" / RECIPE).read_text())["steps"] == 4


def test_the_end_of_a_cosine_moves_and_is_told(recipe, folder, caplog) -> None:
    cosine = {"optimiser": {"schedule": "cosine", "warmup": 0, "learning_rate": 1e-3}}
    rewardsr.finetune(recipe(steps=2, **cosine))
    with caplog.at_level(logging.INFO, "rewardsr"):
        rewardsr.finetune(recipe(steps=4, **cosine), resume=True)
    note = "the run ends at step 4, not 2; its cosine does, too: the learning rate goes on at 0.0005 instead of 0"
    assert note in caplog.messages
    assert [line["learning_rate"] for line in lines(folder / "run")[2:]] == pytest.approx([5e-4, 1.46447e-4], rel=1e-4)


def test_fewer_steps_than_were_taken_are_refused(recipe, folder) -> None:
    rewardsr.finetune(recipe(steps=4))
    before = listing(folder)
    with pytest.raises(UserError, match="has taken 4 steps already, but steps is 3"):
        rewardsr.finetune(recipe(steps=3), resume=True)
    assert listing(folder) == before


# ---- the same run ----


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", {"seed": 1}),
        ("optimiser", {"optimiser": {"betas": (0.5, 0.9)}}),
        ("rewards", {"rewards": [{"name": "psnr"}]}),
        ("trainer_options", {"trainer_options": {"group_size": 3}}),
        ("data", {"data": {"flip": False}}),
        ("data", {"data": {"degradation": {"name": "light", "noise": (9.0, 9.0)}}}),
    ],
)
def test_another_run_is_refused(key, change, recipe, folder) -> None:
    rewardsr.finetune(recipe(steps=1))
    before = listing(folder)
    with pytest.raises(UserError, match=rf"another recipe \(differs in: {key}\)"):
        rewardsr.finetune(recipe(steps=2, **change), resume=True)
    assert listing(folder) == before


def change_pixels(images: Path) -> None:
    other = rewardsr.testing.write_images(images.parent / "others", count=4, size=24)
    shutil.copy(other / "003.png", images / "001.png")


CHANGES = {
    "an image more": lambda images: shutil.copy(images / "000.png", images / "zzz.png"),
    "an image less": lambda images: (images / "002.png").unlink(),
    "another name": lambda images: (images / "002.png").rename(images / "0020.png"),
    "other pixels": change_pixels,
    "another prompt": lambda images: (images / "001.txt").write_text("a dog"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["train", "validation"])
def test_other_images_are_refused(role, change, recipe, folder) -> None:
    images = shutil.copytree(folder / "images", folder / "role")
    for number in range(3):
        (images / f"00{number}.txt").write_text("a cat")
        (folder / "images" / f"00{number}.txt").write_text("a cat")
    data = {"data": {role: str(images), "prompts": "sidecar"}}
    rewardsr.finetune(recipe(steps=1, **data))
    CHANGES[change](images)
    if change == "an image more":
        (images / "zzz.txt").write_text("a cat")
    if change == "another name":
        (images / "002.txt").rename(images / "0020.txt")
    before = listing(folder)
    with pytest.raises(UserError, match=rf"data.{role} .*role'.* are not those that the run began with"):
        rewardsr.finetune(recipe(steps=2, **data), resume=True)
    assert listing(folder) == before


def test_images_may_move(recipe, folder) -> None:
    plain = {"optimiser": {"schedule": "constant"}}
    rewardsr.finetune(recipe(output="straight", steps=2, **plain))
    rewardsr.finetune(recipe(steps=1, **plain))
    (folder / "images").rename(folder / "elsewhere")
    rewardsr.finetune(recipe(steps=2, data={"train": str(folder / "elsewhere")}, **plain), resume=True)
    assert same(folder / "run", folder / "straight")


def test_another_number_of_threads_is_told(recipe, folder, caplog) -> None:
    rewardsr.finetune(recipe(steps=1))
    state = folder / "run" / CHECKPOINTS / "step-00000001" / STATE
    assert json.loads(state.read_text())["threads"] == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        rewardsr.finetune(recipe(steps=2), resume=True)
    finally:
        torch.set_num_threads(1)
    assert "the run used 1 CPU threads, now 2: it will differ in the last bits" in caplog.messages


def drawing(_: Brightness, sr: torch.Tensor, batch: rewardsr.Batch) -> torch.Tensor:
    """Draws from every global generator, as rewards of other people do."""
    count = len(sr)
    return (torch.rand(count) + random.random() * torch.arange(count) + torch.from_numpy(np.random.rand(count))).float()


def test_what_a_reward_draws_by_itself_is_equal_after_a_resume(recipe, folder, monkeypatch) -> None:
    monkeypatch.setattr(Brightness, "__call__", drawing)
    plain = {"optimiser": {"schedule": "constant"}, "checkpoint_every": 2}
    rewardsr.finetune(recipe(output="straight", steps=4, **plain))
    torch.rand(7), random.random(), np.random.rand(5)
    rewardsr.finetune(recipe(steps=2, **plain))
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    rewardsr.finetune(recipe(steps=4, **plain), resume=True)
    assert same(folder / "run", folder / "straight")
    assert lines(folder / "run") == lines(folder / "straight")


# ---- one process a folder ----


@pytest.fixture
def training(recipe, folder):
    """A run in another process that takes its time; killed in the end."""
    rewards = [{"name": "runs:Brightness", "options": {"pause": 0.2}}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(steps=500, rewards=rewards)))
    command = [sys.executable, "-m", "rewardsr", "finetune", str(folder / "recipe.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (folder / "run" / METRICS).is_file():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_one_folder_is_refused_and_the_first_goes_on(training, recipe, folder, commands) -> None:
    answer = commands("finetune", folder / "recipe.yaml", "--resume")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f"output '{folder / 'run'}': another process trains there now" in answer.err
    with pytest.raises(UserError, match="another process trains there"):
        rewardsr.finetune(recipe(steps=1, seed=3))
    assert training.poll() is None
    training.send_signal(signal.SIGKILL)  # its lock goes with it
    training.wait()
    assert (folder / "run" / LOCK).exists()
    rewards = [{"name": "runs:Brightness", "options": {"pause": 0.2}}]
    done = len(lines(folder / "run"))
    assert rewardsr.finetune(recipe(steps=done + 1, rewards=rewards), resume=True).finished
    assert not (folder / "run" / LOCK).exists()


def test_a_refused_run_leaves_no_folder(recipe, folder) -> None:
    with pytest.raises(UserError):
        rewardsr.finetune(recipe(output="deep/er/run", data={"train": str(folder / "nothing")}))
    assert not (folder / "deep").exists()
