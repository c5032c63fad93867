"""RFSR through the loop on a sampler of five steps: what is shipped, what is kept, and going on after an end."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from _data import DATA
from runs import ENVIRONMENT, PATIENCE, assert_equal_runs, content, leftovers, lines, listing, weights
from safetensors.torch import load_file, save_file
from test_training import Interrupted, interrupt

import rewardsr
from rewardsr import load_adapter, load_lora, lora, run_folder
from rewardsr.errors import UserError
from rewardsr.evaluation.report import Evaluation
from rewardsr.options import parse
from rewardsr.rewards import distances
from rewardsr.storage import write_text
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train import checkpoint
from rewardsr.train.dry_run import DryRun
from rewardsr.train.log import RunLog
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.trainers import rfsr
from rewardsr.trainers.ema import EMA, decay_at

STEPS, EMA_DECAY = 12, 0.6
SAMPLER = {"steps": 5, "guidance": 2.0}
# Weights that let every term steer: the paper's are made for networks of another size.
OPTIONS = {
    "vgg": str(DATA / "vgg19_narrow.safetensors"),
    "structure_weight": 1.0,
    "kl_weight": 0.1,
    "ema": EMA_DECAY,
}
EVERY = {"checkpoint_every": 1, "keep_checkpoints": 99}
# AdamW's own eps would blow up the rounding of gradients that are nearly zero.
STEADY = {"optimiser": {"eps": 1e-3}, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a tiny upscaler, a straight run, and one without an average whose every step is kept."""
    made = tmp_path_factory.mktemp("rfsr")
    write_images(made / "images", count=5, size=24)
    tiny_pipeline(made / "base", family="upscaler")
    rewardsr.finetune(written(made, "straight"))
    rewardsr.finetune(written(made, "trained", trainer_options={"ema": 0}, **EVERY))
    return made


def written(folder: Path, output: str, **changes) -> str:
    """The path of a recipe beside the run that it makes."""
    options = OPTIONS | changes.pop("trainer_options", {})
    whole = {"adapter": "sd_upscaler", "adapter_options": SAMPLER, "trainer": "rfsr", "steps": STEPS}
    whole |= {"trainer_options": options, **changes}
    recipe = content(folder, str(folder / "base"), output, **whole)
    write_text(folder / f"{output}.yaml", to_yaml(parse(Recipe, recipe, "recipe")))
    return str(folder / f"{output}.yaml")


@pytest.fixture
def own(folder, tmp_path_factory):
    """Recipes on the shared images and pipeline that write into a folder of the test's own."""
    mine = Path(tmp_path_factory.mktemp("own", numbered=True))
    (mine / "images").symlink_to(folder / "images")
    (mine / "base").symlink_to(folder / "base")
    return lambda output="run", **changes: (written(mine, output, **changes), mine / output)


def kept(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def method_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(kept(run, step) / "method.safetensors")


def trained(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights that were being trained, by their names in the LoRA's file."""
    return part(load_file(kept(run, step) / run_folder.TRAINED), "lora/")


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(value, other[name]) for name, value in one.items())


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def fresh(base: Path) -> dict[str, torch.Tensor]:
    """The LoRA as a run of seed 0 finds it."""
    adapter = load_adapter("sd_upscaler", base, **SAMPLER)
    lora.attach(adapter, 4, 8, seed=0)
    return lora.state_dict(adapter)


def assert_equal_ends(one: Path, other: Path) -> None:
    """Bit for bit, the method's own state included."""
    assert_equal_runs(one, other)
    assert equal(method_state(one, STEPS), method_state(other, STEPS))


# ---- going on ----


@pytest.mark.parametrize(
    ("place", "name", "at", "before"),
    [
        (rfsr.RFSR, "losses", 7, True),  # in the middle of a step
        (EMA, "update", 7, True),  # the optimiser has moved the LoRA, and the average does not know
        (EMA, "state_dict", 2, True),  # a checkpoint has its LoRA and not yet the method's state
        (RunLog, "write", 9, False),  # a step is logged and not saved
        (checkpoint, "write_text", 2, False),  # a checkpoint is written and has no name yet
        (checkpoint, "save", 2, False),
    ],
    ids=str,
)
def test_an_interrupted_run_ends_like_a_straight_one(place, name, at, before, own, folder, monkeypatch) -> None:
    path, run = own()
    with monkeypatch.context() as patch:
        interrupt(patch, place, name, at, before)
        with pytest.raises(Interrupted):
            rewardsr.finetune(path, resume=True)
    result = rewardsr.finetune(path, resume=True)
    assert (result.step, result.finished) == (STEPS, True)
    assert_equal_ends(folder / "straight", run)


KILLS = """
import json, sys, torch
from pathlib import Path
import killing
from rewardsr import load_adapter
from rewardsr.rewards import build
torch.set_num_threads(1)
path, numbers = sys.argv[1], json.loads(sys.argv[2])
content = killing.recipes.load_recipe(path, {}, [])
load_adapter(content.adapter, content.base, **content.adapter_options)  # what is imported before a fork is there after
build("psnr")
deaths = []
for number, delay in [*((number, None) for number in numbers), (None, 1.0), (None, None)]:
    name = killing.attempt(path, number, delay)
    deaths.append((name, [file.name for file in Path(content.output).glob("checkpoints/.*.tmp/*.*")]))
print(json.dumps(deaths))
"""


@pytest.mark.slow
def test_runs_that_are_killed_end_like_straight_ones(own, folder) -> None:
    """At operations on the disk, before and after the method's state is written among them, and at some moment."""
    path, run = own("killed", checkpoint_every=1)
    numbers = [4, 8, 10, 11, 12, 17, 24, 36]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, path, json.dumps(numbers)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    *deaths, moment, end = json.loads(done.stdout.splitlines()[-1])
    assert moment[0] in ("at a random time", None)  # None: it was quicker than that
    assert all(name is not None for name, _ in deaths) and end == [None, []]
    assert {name for name, _ in deaths} >= {"half a line", "fsync", "unlink"}
    unfinished = [set(files) for _, files in deaths]
    assert any(run_folder.LORA in files and "method.safetensors" not in files for files in unfinished)
    assert any("method.safetensors" in files and "state.json" not in files for files in unfinished)
    assert_equal_ends(folder / "straight", run)


def test_several_updates_on_a_group_roll_out_once(own, monkeypatch) -> None:
    settings = {"updates_per_group": 2, "steps": 4, "checkpoint_every": 1}
    path, straight = own("straight", **settings)
    calls = []
    with monkeypatch.context() as patch:
        for name in ("prepare", "losses"):
            original = getattr(rfsr.RFSR, name)
            patch.setattr(rfsr.RFSR, name, lambda *args, name=name, call=original: (calls.append(name), call(*args))[1])
        rewardsr.finetune(path)
    assert calls == ["prepare", "losses", "losses"] * 4
    assert int(method_state(straight, 4)["updates"]) == 8
    path, run = own(**settings)
    with monkeypatch.context() as patch:
        interrupt(patch, EMA, "update", 6, False)  # between the two updates on a group there is one average and a half
        with pytest.raises(Interrupted):
            rewardsr.finetune(path)
    rewardsr.finetune(path, resume=True)
    assert_equal_runs(straight, run)
    assert equal(method_state(straight, 4), method_state(run, 4))


# ---- the average ----


def test_the_shipped_lora_is_the_moving_average_of_the_trained(folder) -> None:
    """Averaged here, in float64, from the steps of a run that has none; training itself does not see the average."""
    average = {name: value.double() for name, value in fresh(folder / "base").items()}
    for step in range(1, STEPS + 1):
        decay = decay_at(step - 1, EMA_DECAY)
        newest = weights(kept(folder / "trained", step))
        average = {name: decay * value + (1 - decay) * newest[name] for name, value in average.items()}
    shipped = weights(folder / "straight")
    assert gap(shipped, average) <= 1e-7
    assert gap(shipped, newest) > 1e-4
    assert equal(trained(folder / "straight", STEPS), newest)


def test_a_checkpoint_shows_the_average_and_keeps_both(folder) -> None:
    for step in (8, 12):
        state = method_state(folder / "straight", step)
        assert equal(weights(kept(folder / "straight", step)), part(state, "average/"))
        assert equal(weights(kept(folder / "trained", step)), trained(folder / "straight", step))
        assert gap(part(state, "average/"), trained(folder / "straight", step)) > 1e-4
        assert int(state["updates"]) == step
    assert equal(weights(folder / "straight"), weights(kept(folder / "straight", STEPS)))


def test_without_an_average_the_trained_weights_are_shipped(folder) -> None:
    average = part(method_state(folder / "trained", STEPS), "average/")
    assert equal(average, trained(folder / "trained", STEPS))
    assert equal(weights(folder / "trained"), average)
    assert gap(weights(folder / "trained"), fresh(folder / "base")) > 1e-3


def test_validation_scores_the_average_and_training_goes_on_from_the_trained(own, folder) -> None:
    held_out = {"validation": str(folder / "images"), "validation_limit": 2}
    path, run = own("looked", data=held_out)
    result = rewardsr.finetune(path)
    told = Evaluation.read(run / "validation" / f"step-{STEPS:08d}.json").rewards
    names = ("runs:Brightness", "psnr")
    adapter = load_lora(load_adapter("sd_upscaler", folder / "base", **SAMPLER), run)
    found = rewardsr.evaluate(adapter, folder / "images", names, limit=2)
    for name in names:
        assert told[name] == found.rewards[name], name
        assert result.validation[name]["tuned_mean"] == found.rewards[name].tuned_mean
    lora.load_state_dict(adapter, trained(run, STEPS))
    newest = rewardsr.evaluate(adapter, folder / "images", names, limit=2)
    for name in names:
        assert all(a != b for a, b in zip(told[name].tuned, newest.rewards[name].tuned, strict=True))
    assert equal(weights(run), weights(folder / "straight"))  # looking does not change what is learnt


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_skipped_update_does_not_reach_the_average(value, own, monkeypatch) -> None:
    """Bit for bit: even an average that takes in an unchanged LoRA once more would move."""
    original, calls = distances.structure, []

    def structure(*args):
        calls.append(None)
        return original(*args) * (value if len(calls) in (3, 5) else 1)

    monkeypatch.setattr(rfsr, "structure", structure)
    path, run = own(steps=6, **EVERY)
    rewardsr.finetune(path)
    assert [line["skipped"] for line in lines(run)] == [0, 0, 1, 1, 2, 2]
    assert all(line["not_finite"] == "loss" for line in lines(run) if "not_finite" in line)
    states = [method_state(run, step) for step in range(1, 7)]
    assert [int(state["updates"]) for state in states] == [1, 2, 2, 3, 3, 4]
    assert [equal(a, b) for a, b in pairwise(states)] == [False, True, False, True, False]
    assert all(tensor.isfinite().all() for tensor in states[-1].values())


# ---- what cannot be resumed ----


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def change(path: Path, how) -> None:
    """Write a tensor file anew, with some tensors changed."""
    save_file({name: how(name, value).contiguous() for name, value in load_file(path).items()}, path)


DAMAGES = {
    "missing": (Path.unlink, "no file"),
    "cut short": (cut, "is damaged"),
    "of another LoRA": (lambda path: save_file({"updates": torch.tensor(1)}, path), "another LoRA or method"),
    "of another rank": (
        lambda path: change(path, lambda name, value: value[:2] if ".lora_A." in name else value),
        "another LoRA or method",
    ),
    "of rank one": (
        lambda path: change(path, lambda name, value: value[:1] if ".lora_A." in name else value),
        "another LoRA or method",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))  # one row spreads over four without a word
def test_a_state_of_the_method_that_does_not_fit_is_refused_in_one_line(damage, own) -> None:
    path, run = own(steps=2)
    rewardsr.finetune(path)
    spoil, message = DAMAGES[damage]
    spoil(kept(run, 2) / "method.safetensors")
    before = listing(run / "checkpoints")
    with pytest.raises(UserError, match=message) as caught:
        rewardsr.finetune(path, resume=True)
    assert "\n" not in str(caught.value) and "method.safetensors" in str(caught.value)
    assert listing(run / "checkpoints") == before and leftovers(run) == []


# ---- the same step in other pieces ----


def test_chunks_and_accumulated_passes_equal_the_whole_batch(own) -> None:
    runs = {
        "whole": {"batch_size": 4},
        "chunks": {"batch_size": 4, "trainer_options": {"micro_batch": 1}},
        "uneven": {"batch_size": 4, "trainer_options": {"micro_batch": 3}},
        "deep": {"batch_size": 2, "accumulate": 2},
    }
    made = {}
    for name, changes in runs.items():
        path, made[name] = own(name, steps=3, **STEADY, **changes)
        rewardsr.finetune(path)
    whole = method_state(made["whole"], 3)
    shares = [line["share/structure"] for line in lines(made["whole"])]
    assert any(0 < share < 1 for share in shares)  # rows of one batch stand at different steps
    for name in ("chunks", "uneven", "deep"):
        assert gap(method_state(made[name], 3), whole) <= 2e-5, name
        for ours, theirs in zip(lines(made["whole"]), lines(made[name]), strict=True):
            assert theirs == {key: pytest.approx(value, rel=1e-3, abs=1e-6) for key, value in ours.items()}, name


def test_gradient_checkpointing_gives_the_same_lora(own) -> None:
    ends = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        path, run = own(name, steps=6, gradient_checkpointing=checkpointing, **STEADY)
        rewardsr.finetune(path)
        ends.append(trained(run, 6))
    assert gap(*ends) <= 1e-5
    assert gap(ends[0], fresh(Path(run).parent / "base")) > 1e-3


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(own, tmp_path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    options = {"name": "runs:TwoProcesses", "options": {"seen": str(seen)}}
    windows = {"reward_window": (0, 4), "kl_window": (2, 4)}  # every row is scored, so that both are seen to be there
    path, two = own("two", steps=3, rewards=[options], trainer_options=windows, **STEADY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "rewardsr", "finetune", path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 3 steps") == 1
    rows = [(seen / str(rank)).read_text().split() for rank in (0, 1)]
    assert rows[0] == rows[1] == ["1", "2", "1", "1", "1"]  # tried, its gradient tried, then an image a step
    path, one = own("one", steps=3, batch_size=2, trainer_options=windows, **STEADY)
    rewardsr.finetune(path)
    assert gap(method_state(one, 3), method_state(two, 3)) <= 1e-5
    assert gap(weights(one), weights(two)) <= 1e-5
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        renamed = {name.replace("Brightness", "TwoProcesses"): value for name, value in ours.items()}
        assert theirs == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in renamed.items()}


# ---- a dry run ----


def test_a_dry_run_takes_a_step_and_writes_nothing(own, folder, commands) -> None:
    path, run = own()
    before = listing(run.parent)
    answer = commands("finetune", path, "--dry-run")
    assert answer.code == 0, answer.err
    assert "17612 weights train" in answer.out
    found = rewardsr.finetune(path, dry_run=True)
    assert isinstance(found, DryRun)
    assert found.metrics["loss"] == lines(folder / "straight")[0]["loss"]
    assert listing(run.parent) == before and not run.exists()


def test_a_dry_run_tells_the_sizes_of_what_a_run_leaves(own, folder) -> None:
    path, _ = own()
    one, checkpoints = rewardsr.finetune(path, dry_run=True).would_save.values()
    size = (folder / "straight" / run_folder.LORA).stat().st_size
    assert 0 < one <= size < 1.5 * one
    size = sum(file.stat().st_size for file in kept(folder / "straight", STEPS).iterdir())
    assert 0 < checkpoints <= size < 1.5 * checkpoints  # the average and the trained weights are in there, too
