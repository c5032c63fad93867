"""Step, log, save, validate: nothing after a step loses it, and a run that ended in between catches up."""

from collections.abc import Callable

import pytest
import runs
import torch
from runs import content, lines, listing, weights

import rewardsr
from rewardsr import TrainingError, UserError, run_folder


@pytest.fixture
def recipe(folder, tmp_path) -> Callable[..., dict]:
    """Recipes on the shared images and pipeline that write to a folder of the test's own."""
    return lambda **changes: content(folder, str(folder / "base"), **{"output": str(tmp_path / "run"), **changes})


def test_a_run_that_ended_before_its_lora_was_written_writes_it(recipe, folder, tmp_path) -> None:
    """As one does that is killed between its last checkpoint and that."""
    held_out = {"data": {"validation": str(folder / "images"), "validation_limit": 1}}
    rewardsr.finetune(recipe(steps=4, **held_out))
    run = tmp_path / "run"
    lora, log = weights(run), (run / run_folder.METRICS).read_text()
    (run / run_folder.LORA).unlink()
    (run / run_folder.METRICS).write_text("\n".join(log.splitlines()[:-1]) + "\n")  # nor was it validated
    assert rewardsr.finetune(recipe(steps=4, **held_out), resume=True).finished
    assert all(torch.equal(value, lora[name]) for name, value in weights(run).items())
    assert (run / run_folder.METRICS).read_text() == log


def test_a_validation_that_fails_loses_no_step(recipe, folder, tmp_path, monkeypatch) -> None:
    held_out = {"data": {"validation": str(folder / "images"), "validation_limit": 1}}
    rewardsr.finetune(recipe(steps=6, output=str(tmp_path / "straight"), **held_out))
    original, calls = runs.Brightness.__call__, []

    def score(self, sr, batch):
        calls.append(None)
        return original(self, sr, batch) * (torch.nan if sr.shape[-1] != 16 and len(calls) > 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Brightness, "__call__", score)
        with pytest.raises(TrainingError, match=r"'runs:Brightness' gave nan for 000\.png \(tuned\)"):
            rewardsr.finetune(recipe(steps=6, checkpoint_every=100, **held_out))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3, 4]
    rewardsr.finetune(recipe(steps=6, checkpoint_every=100, **held_out), resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_checkpoint_of_0_1_0_is_refused_with_a_way_on(recipe, tmp_path) -> None:
    rewardsr.finetune(recipe(steps=2))
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    (newest / run_folder.TRAINED).unlink()  # which 0.1.0 did not write
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"is of rewardsr 0\.1\.0: finish that run with it, or .* lora\.init="):
        rewardsr.finetune(recipe(steps=2), resume=True)
    assert {name: size for name, (size, _) in listing(tmp_path).items()} == {n: s for n, (s, _) in before.items()}
