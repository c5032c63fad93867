"""What fails in one process ends all of them, soon and with its message, and spoils nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ENVIRONMENT, PATIENCE, content, leftovers, lines

from rewardsr.options import parse
from rewardsr.storage import write_text
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train.recipe import Recipe, to_yaml

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rewardsr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and a tiny pipeline."""
    made = tmp_path_factory.mktemp("fail")
    write_images(made / "images", count=4, size=24)
    tiny_pipeline(made / "base")
    return made


def launched(folder: Path, output: str, reward: dict) -> subprocess.Popen:
    recipe = content(folder, str(folder / "base"), output, rewards=[reward], steps=200, checkpoint_every=1)
    write_text(folder / f"{output}.yaml", to_yaml(parse(Recipe, recipe, "recipe")))
    command = [*LAUNCH, "finetune", str(folder / f"{output}.yaml")]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_failure_in_one_ends_both_with_its_message(folder) -> None:
    run = launched(folder, "raises", {"name": "runs:FailsInTheSecond"})
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode != 0
    assert "RuntimeError: a failure of the second process" in output, output[-3000:]
    assert [line["step"] for line in lines(folder / "raises")] == [1]
    checkpoints = sorted(path.name for path in (folder / "raises" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000001"] and leftovers(folder / "raises") == []


def test_a_killed_process_takes_the_others_along(folder) -> None:
    run = launched(folder, "killed", {"name": "runs:Brightness", "options": {"pause": 0.2}})
    log, until = folder / "killed" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < 2:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [child for child in psutil.Process(run.pid).children() if "finetune" in child.cmdline()]
    assert len(workers) == 2
    second = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    run.communicate(timeout=PATIENCE)
    assert run.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
