"""The loop, in this process: schedules, skipped updates, validation, signals, full disks, and what is refused."""

import errno
import json
import math
import os
import signal
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import assert_equal_runs, content, leftovers, lines, listing, weights
from typer.testing import CliRunner

import rewardsr
from rewardsr import run_folder
from rewardsr.cli import app
from rewardsr.errors import TrainingError, UserError
from rewardsr.options import parse
from rewardsr.storage import write_text
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train import checkpoint
from rewardsr.train.dry_run import DryRun
from rewardsr.train.log import RunLog
from rewardsr.train.optimiser import learning_rate
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.trainers import gdpo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a tiny pipeline, and a straight run of 12 steps to compare with."""
    made = tmp_path_factory.mktemp("training")
    write_images(made / "images", count=5, size=24)
    tiny_pipeline(made / "base")
    rewardsr.finetune(content(made, str(made / "base"), "straight"))
    return made


@pytest.fixture
def recipe(folder, tmp_path):
    """Recipes on the shared images and pipeline that write to a folder of the test's own."""

    def make(**changes) -> dict:
        return content(folder, str(folder / "base"), **{"output": str(tmp_path / "run"), **changes})

    return make


class Interrupted(BaseException):
    """Ends a run from within; no Exception, so that nothing in between takes it for an error of its own."""


def interrupt(monkeypatch, place, name: str, at: int, before: bool = True) -> None:
    """Let the call number `at` of a function end the run, before or after it does its work."""
    original, calls = getattr(place, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if before and len(calls) == at:
            raise Interrupted
        result = original(*args, **kwargs)
        if len(calls) == at:
            raise Interrupted
        return result

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize(
    ("place", "name", "at", "before"),
    [
        (gdpo.GDPO, "losses", 7, True),  # in the middle of a step
        (RunLog, "write", 9, False),  # a step is logged and not saved (line 1 is the start)
        (checkpoint, "write_text", 2, False),  # a checkpoint is written and has no name yet
        (checkpoint, "save", 2, False),
    ],
    ids=str,
)
def test_an_interrupted_run_ends_like_a_straight_one(place, name, at, before, recipe, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, place, name, at, before)
        with pytest.raises(Interrupted):
            rewardsr.finetune(recipe(), resume=True)
    result = rewardsr.finetune(recipe(), resume=True)
    assert (result.step, result.finished) == (12, True)
    assert_equal_runs(folder / "straight", tmp_path / "run")


def test_a_straight_run_trains(folder) -> None:
    run = folder / "straight"
    steps = lines(run)
    assert [line["step"] for line in steps] == list(range(1, 13))  # no validation here, so no line of the start
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in steps)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert all(value.any() for value in weights(run).values())
    final, last = weights(run), weights(run / "checkpoints" / "step-00000012")
    assert all(torch.equal(value, last[name]) for name, value in final.items())
    rates = [line["learning_rate"] for line in steps]
    assert rates[:3] == [pytest.approx(1e-3 * (i + 1) / 3) for i in range(3)]
    assert rates[3] == 1e-3 and rates[-1] < 5e-5


def test_resuming_a_finished_run_changes_nothing(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(steps=2))
    before, log = weights(tmp_path / "run"), lines(tmp_path / "run")
    result = rewardsr.finetune(recipe(steps=2), resume=True)
    assert (result.step, result.finished) == (2, True)
    assert lines(tmp_path / "run") == log
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_leaves(number, recipe, folder, tmp_path, monkeypatch) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe())
    original, calls = gdpo.GDPO.losses, []

    def losses(*args):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        yield from original(*args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(gdpo.GDPO, "losses", losses)
        result = CliRunner().invoke(app, ["finetune", path, "--resume"])
    assert result.exit_code == 130
    assert "stopped after step 6; go on with the same command and --resume" in result.output
    assert signal.getsignal(number) == handler
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()  # not due, but saved
    assert not (tmp_path / "run" / run_folder.LORA).exists()
    result = CliRunner().invoke(app, ["finetune", path, "--resume"])
    assert result.exit_code == 0
    assert "finished 12 steps" in result.output
    assert_equal_runs(folder / "straight", tmp_path / "run")


def write_recipe(path, recipe: dict) -> str:
    write_text(path, to_yaml(parse(Recipe, recipe, "recipe")))
    return str(path)


def test_accumulated_passes_equal_a_larger_batch(recipe, tmp_path) -> None:
    for name, changes in (("wide", {"batch_size": 2}), ("deep", {"accumulate": 2})):
        rewardsr.finetune(recipe(steps=3, output=str(tmp_path / name), **changes))
    wide, deep = weights(tmp_path / "wide"), weights(tmp_path / "deep")
    assert all(torch.allclose(value, deep[name], atol=2e-5) for name, value in wide.items())
    for ours, theirs in zip(lines(tmp_path / "wide"), lines(tmp_path / "deep"), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in theirs.items()}


def test_several_updates_on_a_group_sample_once(recipe, tmp_path, monkeypatch) -> None:
    calls = []
    for name in ("prepare", "losses"):
        original = getattr(gdpo.GDPO, name)
        monkeypatch.setattr(
            gdpo.GDPO, name, lambda *args, name=name, call=original: (calls.append(name), call(*args))[1]
        )
    settings = {"updates_per_group": 3, "steps": 4, "checkpoint_every": 1, "optimiser": {"warmup": 0}}
    rewardsr.finetune(recipe(output=str(tmp_path / "straight"), **settings))
    assert calls == ["prepare", "losses", "losses", "losses"] * 4
    state = json.loads((tmp_path / "straight/checkpoints/step-00000004/state.json").read_text())
    assert (state["step"], state["updates"]) == (4, 12)
    losses = [line["loss"] for line in lines(tmp_path / "straight")]
    assert losses[0] != pytest.approx(math.log(2), abs=1e-6)  # the last of three, with fresh noise and a moved policy
    with monkeypatch.context() as patch:
        interrupt(patch, gdpo.GDPO, "losses", 8)
        with pytest.raises(Interrupted):
            rewardsr.finetune(recipe(**settings))
    rewardsr.finetune(recipe(**settings), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def spoil(monkeypatch, how, at: set[int]) -> None:
    """Change the loss of the updates in `at` (from 1)."""
    original, calls = gdpo.gdpo_loss, []

    def loss(logits):
        calls.append(None)
        value, accuracy = original(logits)
        return (how(value, logits) if len(calls) in at else value), accuracy

    monkeypatch.setattr(gdpo, "gdpo_loss", loss)


SPOILS = {
    "loss": lambda value, logits: value * torch.nan,
    "loss, its gradient finite": lambda value, logits: value + torch.inf,
    "gradient of unet.": lambda value, logits: value + (logits * 0).sum().sqrt(),  # 0 with an infinite slope
}


@pytest.mark.parametrize("culprit", SPOILS)
def test_an_update_that_is_not_finite_is_skipped_and_counted(culprit, recipe, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, SPOILS[culprit], {3, 5, 6})
    rewardsr.finetune(recipe(steps=7, checkpoint_every=1, keep_checkpoints=9, max_skipped=3))
    steps = lines(tmp_path / "run")
    assert [line["skipped"] for line in steps] == [0, 0, 1, 1, 2, 3, 3]
    assert [line["step"] for line in steps if "not_finite" in line] == [3, 5, 6]
    assert all(line["not_finite"].startswith(culprit.split(",")[0]) for line in steps if "not_finite" in line)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in log and "Infinity" not in log  # which JSON does not have
    saved = [weights(tmp_path / "run" / "checkpoints" / f"step-{at:08d}") for at in range(1, 8)]
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(saved)]
    assert moved == [True, False, True, False, False, True]
    assert all(value.isfinite().all() for value in saved[-1].values())


def test_too_many_skipped_in_a_row_stop_the_run_and_name_the_culprit(recipe, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, SPOILS["loss"], {3, 5, 6, 7, 8})
        with pytest.raises(TrainingError, match=r"stopped at step 7: 3 updates in a row .*first: loss"):
            rewardsr.finetune(recipe(max_skipped=3))
    assert (tmp_path / "run" / "checkpoints" / "step-00000007").is_dir()
    rewardsr.finetune(recipe(max_skipped=3), resume=True)
    assert lines(tmp_path / "run")[-1]["skipped"] == 4


def test_a_score_that_is_not_finite_stops_the_run_and_checkpoints_stay(recipe, tmp_path, monkeypatch) -> None:
    import runs

    original, calls = runs.Brightness.__call__, []

    def score(self, sr, batch):
        calls.append(None)
        return original(self, sr, batch) * (torch.nan if len(calls) == 7 else 1)  # one call before training tries it

    monkeypatch.setattr(runs.Brightness, "__call__", score)
    with pytest.raises(TrainingError, match="'runs:Brightness'"):
        rewardsr.finetune(recipe())
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_validation_scores_the_policy_and_draws_pictures(recipe, folder, tmp_path) -> None:
    recipe = recipe(steps=6, data={"validation": str(folder / "images"), "validation_limit": 2})
    result = rewardsr.finetune(recipe)
    found = {line["step"]: line["validation"] for line in lines(tmp_path / "run") if "validation" in line}
    assert list(found) == [0, 4, 6]
    assert result.validation == found[6]
    assert set(found[0]) == {"runs:Brightness", "psnr"}
    at_start, at_end = found[0]["psnr"], found[6]["psnr"]
    assert at_start["difference"] == 0 and at_end["difference"] != 0
    assert at_start["base_mean"] == at_end["base_mean"]  # the same images and noise every time
    assert at_end["interval"][0] <= at_end["difference"] <= at_end["interval"][1]
    files = sorted(path.name for path in (tmp_path / "run" / "validation").glob("step-*"))
    assert files == [f"step-{step:08d}.{kind}" for step in (0, 4, 6) for kind in ("json", "png")]
    table = json.loads((tmp_path / "run" / "validation" / "step-00000006.json").read_text())
    assert table["images"] == ["000.png", "001.png"]
    # Looking does not change what is learnt.
    rewardsr.finetune(recipe | {"data": recipe["data"] | {"validation": None}, "output": str(tmp_path / "blind")})
    blind = weights(tmp_path / "blind")
    assert all(torch.equal(value, blind[name]) for name, value in weights(tmp_path / "run").items())


def test_validation_holds_one_image_at_a_time(recipe, folder, tmp_path, monkeypatch) -> None:
    import runs

    original, seen, alive = runs.Brightness.__call__, [], []

    def score(self, sr, batch):
        if not any(reference() is sr for reference in seen):
            seen.append(weakref.ref(sr))
        alive.append(sum(reference() is not None for reference in seen))
        return original(self, sr, batch)

    monkeypatch.setattr(runs.Brightness, "__call__", score)
    write_images(tmp_path / "many", count=12, size=24)
    rewardsr.finetune(recipe(steps=1, data={"validation": str(tmp_path / "many")}))
    assert len(seen) >= 3 * 12  # by the base once, by the policy at the start and the end
    assert max(alive) <= 2  # the one at hand, and the one before until it is replaced


def test_a_dry_run_takes_a_step_and_writes_nothing(recipe, tmp_path) -> None:
    found = rewardsr.finetune(recipe(), dry_run=True)
    assert isinstance(found, DryRun)
    assert found.seconds > 0 and found.peak_gib > 0.05
    assert found.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert list(tmp_path.iterdir()) == []
    rewardsr.finetune(recipe(steps=1))
    size = (tmp_path / "run" / run_folder.LORA).stat().st_size
    (promised, _) = found.would_save.values()
    assert 0 < promised <= size < promised * 1.5


def test_learning_rate() -> None:
    recipe = parse(
        Recipe,
        content(Path(), "base", steps=10, updates_per_group=2),
        "recipe",
    )
    rates = [learning_rate(recipe, update) for update in range(20)]
    assert rates[:4] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[3 + 17 // 2] == pytest.approx(5e-4, rel=0.1)
    assert 0 < rates[-1] < 1e-5
    flat = recipe.model_copy(update={"optimiser": recipe.optimiser.model_copy(update={"schedule": "constant"})})
    assert {learning_rate(flat, update) for update in range(3, 20)} == {1e-3}


def test_another_recipe_or_folder_is_refused_and_nothing_changes(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(steps=2))
    before = listing(tmp_path)
    for changes, resume, message in (
        ({"steps": 2}, False, "holds a run already.*--resume"),
        ({"steps": 3, "batch_size": 2}, True, r"another recipe \(differs in: batch_size\)"),
        ({"steps": 2, "lora": {"rank": 2}, "seed": 1}, True, "differs in: lora, seed"),
        ({"steps": 2, "output": str(tmp_path)}, True, "is not empty and holds no run"),
        ({"steps": 2, "output": str(tmp_path / "run" / "recipe.yaml")}, True, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            rewardsr.finetune(recipe(**changes), resume=resume)
    assert listing(tmp_path) == before
    rewardsr.finetune(recipe(steps=2, checkpoint_every=1, max_skipped=2), resume=True)  # these may change


def test_a_folder_with_no_more_than_a_killed_writers_leftover_is_free(recipe, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.123.tmp").write_text("base:")
    rewardsr.finetune(recipe(steps=1), resume=True)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("failing", [5, 6, 7, 8])
def test_a_full_disk_keeps_the_checkpoint_before(failing, recipe, folder, tmp_path, monkeypatch) -> None:
    """Each of the four files of the second checkpoint."""
    original, calls = os.fsync, []

    def fsync(file):
        if len(list((tmp_path / "run").glob("checkpoints/.*"))) or calls:  # while a checkpoint is written
            calls.append(None)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            rewardsr.finetune(recipe())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert leftovers(tmp_path / "run") == []
    rewardsr.finetune(recipe(), resume=True)
    assert_equal_runs(folder / "straight", tmp_path / "run")


def test_a_full_disk_under_the_log_is_one_line(recipe, tmp_path) -> None:
    log = RunLog(tmp_path, parse(Recipe, recipe(), "recipe"), 0, True)
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    log._file = Path("/dev/full")
    with pytest.raises(UserError, match="cannot write '/dev/full': No space left"):
        log.write(1, {"loss": 1.0})


def test_a_damaged_checkpoint_is_named(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(steps=2))
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    for name, message in (
        ("state.json", "is damaged"),
        ("optimiser.safetensors", "is damaged"),
        (run_folder.LORA, "is damaged"),
    ):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=message):
            rewardsr.finetune(recipe(steps=2), resume=True)
        (newest / name).write_bytes(content)
    rewardsr.finetune(recipe(steps=2), resume=True)


def test_another_number_of_processes_is_refused(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(steps=4))
    (state,) = (tmp_path / "run" / "checkpoints").glob("step-00000004/state.json")
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 2}))
    with pytest.raises(UserError, match="had 2 processes, now there are 1"):
        rewardsr.finetune(recipe(steps=4), resume=True)
