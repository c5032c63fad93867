"""What a run tells while it trains, what a tracker gets of it, and what a dry run foretells."""

import json
import math
import re
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
from runs import content, listing

import rewardsr
from rewardsr import progress
from rewardsr.data.images import read_image
from rewardsr.options import parse
from rewardsr.storage import write_text
from rewardsr.testing import write_images
from rewardsr.train import dry_run
from rewardsr.train.dry_run import Device, DryRun, ValidationCost
from rewardsr.train.log import RunLog, flatten, validation_lines
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.train.trackers import Trackers

UP = {"base_mean": 22.6701, "tuned_mean": 22.83, "difference": 0.1599, "interval": [0.12, 0.2]}
DOWN = {"base_mean": 0.519, "tuned_mean": 0.51, "difference": -0.009, "interval": [-0.012, -0.006]}
AROUND = {"base_mean": 0.2115, "tuned_mean": 0.217, "difference": 0.0055, "interval": [-0.0021, 0.0132]}
ONE = {"base_mean": 1234.5, "tuned_mean": 1235.5, "difference": 1.0, "interval": [None, None]}
FOUND = {"ssim": DOWN, "detail_correlation": AROUND, "psnr": UP, "score": ONE}


@pytest.fixture
def recipe(folder, tmp_path):
    def make(**changes) -> dict:
        return content(folder, str(folder / "base"), **{"output": str(tmp_path / "run"), **changes})

    return make


def test_a_validation_in_words() -> None:
    lines = list(validation_lines(100, FOUND, ["psnr", "detail_correlation"]))
    assert lines == [
        "validation at step 100, base -> policy, change [95 % interval]:",
        "  steers ~ detail_correlation  0.2115 -> 0.2170    +0.0055 [-0.0021, +0.0132]",
        "  steers ↑ psnr                22.6701 -> 22.8300  +0.1599 [+0.1200, +0.2000]",
        "  guard  ↓ ssim                0.5190 -> 0.5100    -0.0090 [-0.0120, -0.0060]",
        "  guard  ~ score               1234.5 -> 1235.5    +1.0000",
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [40, 60])
def test_a_validation_on_a_narrow_screen(width) -> None:
    lines = list(validation_lines(100, FOUND, ["psnr"], width))
    assert max(len(line) for line in lines[1:]) <= width
    place = lines.index("  guard  ↓ ssim")
    assert lines[place + 1 : place + 3] == ["           0.5190 -> 0.5100", "           -0.0090 [-0.0120, -0.0060]"]


def test_before_the_first_step_there_are_the_bases_scores_alone() -> None:
    same = {"base_mean": 22.67, "tuned_mean": 22.67, "difference": 0.0, "interval": [0.0, 0.0]}
    assert list(validation_lines(0, {"psnr": same}, ["psnr"])) == ["validation at step 0: as the base: psnr 22.6700"]


def test_what_should_rise_comes_before_what_never_does(recipe, tmp_path, capfd) -> None:
    chosen = recipe(steps=4, rewards=[{"name": "psnr"}, {"name": "ssim", "weight": 0}])
    with RunLog(tmp_path, parse(Recipe, chosen, "recipe"), 0, True) as log:
        log.write(0, {"validation": {"psnr": {**UP, "difference": 0.0}}})
        step = {"loss": 0.5, "implicit_accuracy": 1.0, "loss/kl": 0.25, "reference/psnr": 22.5, "grad_norm": 2.0}
        log.write(1, {**step, "skipped": 0})
        log.write(2, {"validation": {"psnr": UP, "ssim": DOWN}})
        log.write(2, {**step, "implicit_accuracy": 0.0, "loss": math.nan, "skipped": 1})
    first, second = capfd.readouterr().err.splitlines()
    parts = "  loss 0.5  accuracy 1  kl 0.25  gradient 2  base psnr 22.5"
    assert re.fullmatch(rf"step 1/4  \S+ it/s  ETA 0:00:0\d{parts}", first)
    # Means of what was finite; a guard's change is no aim.
    parts = "  accuracy 0.5  kl 0.25  gradient 2  base psnr 22.5"
    assert re.fullmatch(rf"step 2/4  \S+ it/s  ETA 0:00:0\d  skipped 1  psnr \+0.16↑{parts}", second)


def test_trackers_get_the_ends_of_intervals() -> None:
    flat = flatten({"validation": {"psnr": UP, "score": ONE}})
    assert flat["validation/psnr/low"] == 0.12 and flat["validation/psnr/high"] == 0.2
    assert "validation/score/low" not in flat and flat["validation/score/difference"] == 1.0


def test_tensorboard_gets_numbers_pictures_and_the_recipe(recipe, folder, tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    held_out = {"validation": str(folder / "images"), "validation_limit": 2}
    chosen = recipe(steps=3, validate_every=3, log_with=["tensorboard"], data=held_out)
    rewardsr.finetune(chosen)
    found = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()  # the folder's name is the run's
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in found.Scalars("validation/psnr/tuned_mean")] == [0, 3]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["validation"]["psnr"]
    ends = [found.Scalars(f"validation/psnr/{end}")[-1].value for end in ("low", "high")]
    assert ends == pytest.approx(last["interval"]) and ends[0] < ends[1]
    tags = [tag for tag in found.Tags()["images"] if tag.startswith("validation/")]
    assert len(tags) == 2
    (tmp_path / "row.png").write_bytes(found.Images(tags[0])[-1].encoded_image_string)
    row = (read_image(tmp_path / "row.png") * 255).round()
    whole = (read_image(tmp_path / "run" / "validation" / "step-00000003.png") * 255).round()
    assert np.array_equal(row.numpy(), whole[:, : row.shape[1], : row.shape[2]].numpy())  # LQ | base | policy | HQ
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert to_yaml(parse(Recipe, chosen, "recipe")).splitlines()[0] in text and "validate_every: 3" in text
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoints", "validation"}


def test_tensorboard_after_a_resume_tells_of_each_step_once(recipe, tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rewardsr.finetune(recipe(steps=6, log_with=["tensorboard"]))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*6"):
        path.rename(tmp_path / "away")
    rewardsr.finetune(recipe(steps=6, log_with=["tensorboard"], run_name=None), resume=True)
    found = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_name_of_ones_own(recipe, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    made = Trackers(tmp_path, parse(Recipe, recipe(log_with=["tensorboard"], run_name="blurred-3"), "recipe"), 0)
    made.finish()
    assert list((tmp_path / "blurred-3").glob("events.out.tfevents.*"))
    with pytest.raises(rewardsr.UserError, match="run_name"):
        parse(Recipe, recipe(run_name="../outside"), "recipe")


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def test_weights_and_biases_gets_the_same(recipe, folder, tmp_path, monkeypatch) -> None:
    """Without its service, which keeps what it would send in a file."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    held_out = {"validation": str(folder / "images"), "validation_limit": 1}
    rewardsr.finetune(recipe(steps=2, validate_every=2, log_with=["wandb"], data=held_out))
    (own,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (file,) = own.glob("*.wandb")
    until = time.monotonic() + 60  # its other process writes the last of it when the run is over
    while not (records := [Record.FromString(one) for one in wandb_records(file.read_bytes())])[-1].HasField("exit"):
        assert time.monotonic() < until
        time.sleep(0.1)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.project) == ("run", "rewardsr")
    config = {entry.key: json.loads(entry.value_json) for record in records for entry in record.config.update}
    assert config["trainer"] == "gdpo" and config["data"]["crop"] == 16
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [entry["_step"] for entry in history] == [0, 1, 2]
    assert "validation/runs:Brightness/tuned_mean" in history[2] and "loss" in history[2]
    for entry in (history[0], history[2]):
        assert entry["validation/000/_type"] == "images/separated"
        assert all((own / "files" / name).is_file() for name in entry["validation/000/filenames"])


# ---- a dry run ----


def test_a_dry_run_tells_what_the_whole_run_costs(recipe, folder, tmp_path) -> None:
    held_out = {"validation": str(folder / "images"), "validation_limit": 2}
    path = tmp_path / "recipe.yaml"
    write_text(path, to_yaml(parse(Recipe, recipe(steps=1000, validate_every=300, data=held_out), "recipe")))
    before = listing(tmp_path)
    found = rewardsr.finetune(path, dry_run=True)
    assert isinstance(found, DryRun) and listing(tmp_path) == before
    assert found.counts == {"steps": 1000, "validations": 5, "checkpoints": 250}
    assert found.validation is not None and found.validation.images == 2
    assert found.validation.first > found.validation.later > 0
    assert found.parts["steps"] == pytest.approx(1000 * found.seconds)
    assert found.parts["validations"] == pytest.approx(found.validation.first + 4 * found.validation.later)
    assert found.device.name.startswith("CPU with") and 0 < found.device.free_gib <= found.device.total_gib
    assert found.fits and "it fits" in str(found)


def measured(**changes) -> DryRun:
    cost = ValidationCost("0001.png", 14, 30.0, 12.0)
    given = {
        "first_seconds": 9.0,
        "seconds": 0.5,
        "peak_gib": 11.2,
        "trainable": 1000,
        "would_save": {"run/lora": 2**20, "run/checkpoints/step-*/": 200_000_000},
        "metrics": {},
        "device": Device("NVIDIA A10", 22.0, 21.5),
        "validation": cost,
        "counts": {"steps": 1000, "validations": 11, "checkpoints": 10},
    }
    return DryRun(**(given | changes))


def test_a_dry_run_in_words() -> None:
    assert str(measured()).splitlines()[:4] == [
        "one step: 0.50 s (the first: 9.00 s), 1000 weights train",
        "one validation: 14 images in about 0:00:12, the first with the base's scores 0:00:30 (by 0001.png, the "
        "largest)",
        "the whole run: about 0:11:00 (1000 steps 0:08:20, 11 validations 0:02:30, 10 checkpoints 0:00:10)",
        "peak memory 11.20 GiB on NVIDIA A10, 22.0 GiB, 21.5 GiB of them free: it fits",
    ]
    told = str(measured(peak_gib=21.6, validation=None))
    assert "it does not fit" in told and "validation" not in told


def test_what_took_a_minute_is_not_measured_again(recipe, folder, monkeypatch) -> None:
    steps, scores = [], []
    step, score = dry_run.step, dry_run.HeldOut.score
    monkeypatch.setattr(dry_run, "step", lambda *given: (steps.append(0), step(*given))[1])
    monkeypatch.setattr(dry_run.HeldOut, "score", lambda *given: (scores.append(0), score(*given))[1])
    for cheap, times in ((60.0, 2), (0.0, 1)):
        monkeypatch.setattr(dry_run, "CHEAP", cheap)
        steps.clear(), scores.clear()
        found = rewardsr.finetune(recipe(data={"validation": str(folder / "images")}), dry_run=True)
        assert (len(steps), len(scores)) == (times, times)
        assert (found.seconds == found.first_seconds) == (times == 1)


def test_validations_and_the_cast_test_tell_how_far_they_have_come(recipe, folder, capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SELDOM", 0)
    data = {"validation": str(folder / "images"), "validation_limit": 2}
    rewardsr.finetune(recipe(steps=1, data=data, cast_test=True))
    told = [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()]
    validation, images = ["validation 1/2", "validation 2/2"], len(list((folder / "images").iterdir()))
    offset = [f"cast test: offset {n}/{images}" for n in range(1, images + 1)]
    cast = [*offset, "cast test 1/2", "cast test 2/2"]
    assert told[told.index("validation 1/2") :] == [*validation, "step 1/1", *validation, *cast]
    rewardsr.finetune(recipe(steps=1, data=data, output="none"), dry_run=True)
    assert "validation" not in capfd.readouterr().err, "it has a word of its own"


def test_the_largest_held_out_image_is_measured_and_stands_for_the_others_by_their_pixels(recipe, tmp_path) -> None:
    mixed = write_images(tmp_path / "mixed", count=1, size=24)
    (write_images(tmp_path / "large", count=2, size=48) / "001.png").rename(mixed / "001.png")
    found = rewardsr.finetune(recipe(data={"validation": str(mixed)}), dry_run=True)
    assert found.validation is not None and (found.validation.measured, found.validation.images) == ("001.png", 2)
