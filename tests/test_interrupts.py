"""Ctrl-C and SIGTERM, sent to real processes on a terminal, while they load, train, validate and wait in a library."""

import signal
import time
from pathlib import Path

import pytest
from _terminal import Terminal
from runs import assert_equal_runs, content, lines

import rewardsr
from rewardsr.options import parse
from rewardsr.storage import write_text
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train.recipe import Recipe, to_yaml

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and a tiny pipeline."""
    made = tmp_path_factory.mktemp("interrupts")
    write_images(made / "images", count=3, size=24)
    tiny_pipeline(made / "base")
    return made


def written(folder, output: str, pause: float, **changes) -> str:
    """The path of a recipe whose reward takes so many seconds."""
    slow = {"rewards": [{"name": "runs:Brightness", "options": {"pause": pause}}]}
    recipe = parse(Recipe, content(folder, str(folder / "base"), output, **slow, **changes), "recipe")
    write_text(folder / f"{output}.yaml", to_yaml(recipe))
    return str(folder / f"{output}.yaml")


def started(path: str, *options: str) -> Terminal:
    return Terminal("-m", "rewardsr", "finetune", path, *options, env=ENVIRONMENT)


@BOTH
def test_a_step_is_finished_and_the_run_goes_on_as_if_nothing_had_been(folder, number) -> None:
    path = written(folder, f"step-{number}", 0.5, steps=5)
    terminal = started(path)
    terminal.read(terminal.shows("step 2/5"))
    terminal.send(number)
    answered = terminal.read(terminal.shows("stopping after this step; once more to quit"))
    assert answered < 1
    assert terminal.end() == 130 and terminal.cursor
    assert any("go on with the same command and --resume" in line for line in terminal.lines)
    assert not any("step 2/5" in line or "step 3/5" in line for line in terminal.lines)
    assert rewardsr.finetune(path, resume=True).finished
    straight = written(folder, f"straight-{number}", 0, steps=5)
    rewardsr.finetune(straight)
    assert_equal_runs(folder / f"straight-{number}", folder / f"step-{number}")


@BOTH
def test_a_second_one_quits_at_once_and_says_what_is_kept(folder, number) -> None:
    path = written(folder, f"quit-{number}", 8, steps=5, checkpoint_every=1)
    terminal = started(path)
    terminal.read((folder / f"quit-{number}" / "checkpoints" / "step-00000001").is_dir)
    terminal.send(number)
    assert terminal.read(terminal.shows("stopping after this step; once more to quit")) < 1
    terminal.send(number)
    began = time.monotonic()
    assert terminal.end() == 128 + number and terminal.cursor
    assert time.monotonic() - began < 6
    assert terminal.shows("interrupted: step 1 is kept; go on with the same command and --resume")()
    assert [line["step"] for line in lines(folder / f"quit-{number}")] == [1]


def test_a_validation_is_left_off_and_made_up_for(folder) -> None:
    data = {"validation": str(folder / "images")}
    path = written(folder, "looked", 1.0, steps=1, data=data)
    terminal = started(path)
    log = folder / "looked" / "metrics.jsonl"
    terminal.read(lambda: log.exists() and '"step": 1' in log.read_text())
    before = len(terminal.frames)
    terminal.read(lambda: any(frame.startswith("validation 0/3") for frame in terminal.frames[before:]))
    terminal.send(signal.SIGINT)
    assert terminal.read(terminal.shows("stopping after this image, step 1 is saved; once more to quit")) < 1
    assert terminal.end() == 130
    assert any("stopped after step 1; go on with the same command and --resume" in line for line in terminal.lines)
    assert [("validation" in line) for line in lines(folder / "looked")] == [True, False]
    assert rewardsr.finetune(path, resume=True).finished
    assert [("validation" in line) for line in lines(folder / "looked")] == [True, False, True]


def test_while_things_load_it_ends_and_says_that_nothing_was_written(folder) -> None:
    path = written(folder, "loading", 30)  # a reward is tried out before training
    terminal = started(path)
    terminal.read(lambda: (folder / "loading").exists())
    time.sleep(1)
    terminal.send(signal.SIGINT)
    began = time.monotonic()
    assert terminal.end() == 130
    assert time.monotonic() - began < 6
    assert terminal.shows("interrupted: nothing was written")()
    assert not (folder / "loading").exists()


COMMAND = """
import time
from rewardsr import interrupts, progress

@interrupts.keeping("finished images are kept")
def work():
    with progress.bar("upscale", 3), interrupts.keeping("not said: the innermost knows best"):
        pass
    with progress.bar("upscale", 3):
        time.sleep(60)

with interrupts.ending():
    work()
"""


@BOTH
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_ends_at_once_and_says_what_is_kept(number, rank) -> None:
    script = COMMAND.replace("import time", f"import os, time\nos.environ['RANK'] = '{rank}'\nprint('on')")
    terminal = Terminal("-c", script)
    terminal.read(terminal.shows("upscale 0/3" if rank == "0" else "on"))
    time.sleep(0 if rank == "0" else 3)
    terminal.send(number)
    began = time.monotonic()
    assert terminal.end() == 128 + number and terminal.cursor
    assert time.monotonic() - began < 3
    said = [line for line in terminal.lines if "interrupted" in line]
    assert said == (["interrupted: finished images are kept"] if rank == "0" else [])


BUSY = """
import torch
from rewardsr import interrupts, progress
interrupts.GRACE = 1.0
torch.set_num_threads(1)
big = torch.rand(6000, 6000)
stop = interrupts.Stop("after this; once more to quit")
with interrupts.ending(), progress.bar("stuck", 3), interrupts.finishing(stop):
    torch.linalg.eigvals(big)  # minutes in a single call
"""


def test_a_library_that_keeps_the_main_thread_is_answered_and_ended() -> None:
    terminal = Terminal("-c", BUSY)
    terminal.read(terminal.shows("stuck 0/3"))
    terminal.send(signal.SIGTERM)
    assert terminal.read(terminal.shows("after this; once more to quit")) < 1
    terminal.send(signal.SIGTERM)
    began = time.monotonic()
    assert terminal.end() == 128 + signal.SIGTERM and terminal.cursor
    assert 0.5 < time.monotonic() - began < 4


def test_a_script_of_ones_own_gets_keyboard_interrupt(folder) -> None:
    path = written(folder, "script", 8, steps=5)
    script = f"import rewardsr\\ntry:\\n    rewardsr.finetune({path!r})\\nexcept KeyboardInterrupt as error:\\n"
    script = script.replace("\\n", "\n") + "    print('mine', error.__notes__)\n"
    terminal = Terminal("-c", script, env=ENVIRONMENT)
    terminal.read(terminal.shows("step 0/5"))
    terminal.send(signal.SIGINT)
    assert terminal.read(terminal.shows("once more to quit")) < 1
    terminal.send(signal.SIGINT)
    assert terminal.end() == 0
    assert terminal.shows("mine ['there is no checkpoint yet']")()
