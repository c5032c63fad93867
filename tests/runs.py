"""What the tests of training share: a tiny run, and what it left."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rewardsr import run_folder
from rewardsr.batch import Batch
from rewardsr.options import Options

# Of processes that tests start.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
PATIENCE = 240  # seconds that one may take on a loaded machine

MAIN = "runs:Brightness"
OPTIONS = {"group_size": 2, "preference": "conditional", "beta": 100.0}


class BrightnessOptions(Options):
    """Of the rewards below."""

    pause: float = 0.0  # seconds a call; gives a test the time to send a signal
    seen: Path = Path()  # folder where `TwoProcesses` writes


class Brightness:
    """A reward that costs nothing: how bright `sr` is."""

    name, kind, licence = "brightness", "fidelity", "Apache-2.0"
    needs_hq, differentiable = False, True
    Options = BrightnessOptions

    def __init__(self, options: BrightnessOptions) -> None:
        self._options = options

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        time.sleep(self._options.pause)
        return sr.mean((1, 2, 3))


class TwoProcesses(Brightness):
    """The same; refuses to score unless two processes run, and notes the images that each sees in `seen`."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        if torch.distributed.get_world_size() != 2:
            raise AssertionError("expected two processes")
        with (self._options.seen / str(torch.distributed.get_rank())).open("a") as file:
            file.write(f"{len(batch)}\n")
        return super().__call__(sr, batch)


class FailsInTheSecond(Brightness):
    """The same; in the second process it fails in the second step."""

    calls = 0

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        type(self).calls += 1
        if torch.distributed.get_rank() == 1 and self.calls > 2:  # tried on a crop, then one group a step
            raise RuntimeError("a failure of the second process")
        return super().__call__(sr, batch)


def content(folder: Path, base: str, output: str = "run", **changes: Any) -> dict[str, Any]:
    """A recipe of 12 short steps on the images in `folder/images`; `data`, `optimiser` are added to."""
    recipe: dict[str, Any] = {
        "base": base,
        "adapter_options": {"noise_t": 250, "net_t": 100, "scale": 4},
        "trainer_options": OPTIONS,
        "rewards": [{"name": MAIN}],
        "guards": ["psnr"],
        "output": str(folder / output),
        "steps": 12,
        "device": "cpu",
        "checkpoint_every": 4,
        "validate_every": 4,
        "keep_checkpoints": 2,
    }
    data = {"train": str(folder / "images"), "crop": 16} | changes.pop("data", {})
    optimiser = {"learning_rate": 1e-3, "warmup": 3, "schedule": "cosine"} | changes.pop("optimiser", {})
    return recipe | {"data": data, "optimiser": optimiser} | changes


def weights(folder: Path) -> dict[str, Tensor]:
    """The LoRA that a run, or a checkpoint, left."""
    return load_file(folder / run_folder.LORA)


def lines(run: Path) -> list[dict[str, Any]]:
    """The log without the time that each step took."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit for bit the same LoRA and optimiser, and the same log, each step once."""
    assert [line["step"] for line in lines(other)] == [line["step"] for line in lines(one)]
    assert lines(one) == lines(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    assert newest[0].name == newest[1].name
    for file in (run_folder.TRAINED, run_folder.MOMENTS):
        states = [load_file(path / file) for path in newest]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert leftovers(other) == []


def leftovers(run: Path) -> list[Path]:
    """Temporary files and folders that were not cleaned up."""
    return [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def listing(folder: Path) -> dict[str, tuple[int, float]]:
    """Every file below a folder with its size and time."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in files}
