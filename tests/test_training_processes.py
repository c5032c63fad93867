"""The loop in processes of its own: killed at any moment it goes on bit for bit, and two processes equal one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, PATIENCE, assert_equal_runs, content, lines, weights

import rewardsr
from rewardsr.options import parse
from rewardsr.run_folder import ENDING
from rewardsr.storage import write_text
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train.recipe import Recipe, to_yaml

EVERY = {"checkpoint_every": 1, "validate_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and a tiny pipeline."""
    made = tmp_path_factory.mktemp("processes")
    write_images(made / "images", count=5, size=24)
    tiny_pipeline(made / "base")
    return made


def written(folder, output: str, **changes) -> str:
    """The path of a recipe."""
    recipe = parse(Recipe, content(folder, str(folder / "base"), output, **changes), "recipe")
    write_text(folder / f"{output}.yaml", to_yaml(recipe))
    return str(folder / f"{output}.yaml")


def test_runs_that_are_killed_end_like_straight_ones(folder) -> None:
    """One at every operation on the disk, checkpoints included; one at random moments."""
    looked = {**EVERY, "steps": 6, "data": {"validation": str(folder / "images"), "validation_limit": 1}}
    slow = {**EVERY, "rewards": [{"name": "runs:Brightness", "options": {"pause": 0.25}}]}
    rewardsr.finetune(written(folder, "straight-looked", **looked))
    rewardsr.finetune(written(folder, "straight", **EVERY))
    paths = [written(folder, "disk", **looked), written(folder, "random", **slow)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), *paths, "0"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    deaths = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in deaths["disk"]} >= {"fsync", "replace", "unlink", "rmdir", "half a line"}
    assert len(deaths["disk"]) >= 15 and len(deaths["random"]) >= 2
    assert_equal_runs(folder / "straight-looked", folder / "disk")
    assert_equal_runs(folder / "straight", folder / "random")


def test_the_command_leaves_on_a_signal_and_goes_on(folder) -> None:
    path = written(folder, "command", rewards=[{"name": "runs:Brightness", "options": {"pause": 0.5}}], steps=6)
    log = folder / "command" / "metrics.jsonl"
    command = [sys.executable, "-m", "rewardsr", "finetune", path, "--resume"]
    first = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_lines(log, 2, first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, said
    assert "go on with the same command and --resume" in said
    assert rewardsr.finetune(path, resume=True).step == 6  # here: the same numbers come from another process
    rewardsr.finetune(written(folder, "straight-6", steps=6))
    assert_equal_runs(folder / "straight-6", folder / "command")


def wait_for_lines(log: Path, count: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_processes_equal_one_with_twice_the_batch(folder) -> None:
    seen = folder / "seen"
    seen.mkdir()
    changes = {"steps": 3, "data": {"validation": str(folder / "images"), "validation_limit": 2}}
    changes["optimiser"] = {"eps": 1e-3}  # AdamW's own would blow up the rounding of gradients that are nearly zero
    options = {"name": "runs:TwoProcesses", "options": {"seen": str(seen)}}
    path = written(folder, "two", rewards=[options], guards=["psnr"], **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "rewardsr", "finetune", path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 3 steps") == 1  # one of them speaks
    assert sorted(path.name for path in seen.iterdir()) == ["0", "1"]
    rows = [(seen / str(rank)).read_text().split() for rank in (0, 1)]
    # Tried on a crop and on a held-out image; a group of one image a step; validation of one image, base and policy.
    assert rows[0] == rows[1] == ["1", "1", "1", "1", "2", "2", "2", "1"]
    rewardsr.finetune(written(folder, "one", batch_size=2, **changes))
    one, two = weights(folder / "one"), weights(folder / "two")
    assert max(float((value - two[name]).abs().max()) for name, value in one.items()) <= 1e-5
    assert any(float(value.abs().max()) > 1e-4 for name, value in one.items() if ".lora_B." in name)
    ours, theirs = lines(folder / "one"), lines(folder / "two")
    assert len(ours) == len(theirs) == 5  # validation at the start and the end, and three steps
    start = [(folder / run / "validation" / "step-00000000.json").read_text() for run in ("one", "two")]
    assert start[0].replace("Brightness", "TwoProcesses") == start[1]  # of equal weights, bit for bit
    for line, other in zip(ours, theirs, strict=True):
        renamed = {name.replace("Brightness", "TwoProcesses"): value for name, value in line.items()}
        for each in (renamed, other):
            each.pop("validation", None), each.pop("guards", None)
        assert other == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in renamed.items()}


def test_two_processes_agree_to_stop(folder) -> None:
    changes = {
        "trainer": "rfsr",
        "trainer_options": {"structure_weight": 0, "kl_weight": 0, "text_dropout": 0, "ema": 0.5},
        "guards": [{"name": "color_shift", "margin": 0.1}],
        "stop_when": {},
        "cast_test": True,
        "validate_every": 1,
        "optimiser": {"learning_rate": 1.5e-3, "warmup": 0, "schedule": "constant"},
        "data": {"validation": str(folder / "images"), "validation_limit": 3},
    }
    path = written(folder, "agree", **changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for _ in range(2):  # a resumed run learns from the log of one of them that it has ended
        done = subprocess.run(
            [*launch, "-m", "rewardsr", "finetune", path, "--resume"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("stopped by its guards after") == 1, done.stdout
    run = folder / "agree"
    record = json.loads((run / ENDING).read_text())
    assert record["stopped"] and 0 < record["shipped"] < record["step"] < 12
    best = weights(run / "checkpoints" / f"step-{record['shipped']:08d}")
    assert all(torch.equal(value, best[name]) for name, value in weights(run).items())
    assert "casts" in json.loads((run / "validation" / f"step-{record['shipped']:08d}.json").read_text())


AGREE = """
import json
import torch
from rewardsr.train.loop import _agree
from rewardsr.train.processes import make_accelerator
accelerator = make_accelerator(torch.device("cpu"))
rank = accelerator.process_index
own = [{"only here": 5.0}, {"not_finite": "loss2", "there": 7.0}]
mine = {"loss": 1.0 + rank, **own[rank]}
found = _agree(accelerator, mine, rank == 1)
if rank == 0:
    print(json.dumps([*found, accelerator.init_handler.timeout.total_seconds()]))
"""


def test_metrics_are_averaged_by_name_over_the_processes_that_have_them(tmp_path) -> None:
    (tmp_path / "agree.py").write_text(AGREE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "agree.py")], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    metrics, stop, patience = json.loads(done.stdout.splitlines()[-1])
    assert patience == 7200, "a long validation of another process is waited for"
    assert metrics == {"loss": 1.5, "only here": 5.0, "there": 7.0, "not_finite": "loss2"} and stop
