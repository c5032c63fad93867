"""What several test files share: running commands in-process, and looking at what they left on the disk."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rewardsr import cli

# A step of training in a tenth of a second: three outputs of 32 pixels.
QUICK = ("data.crop=32", "adapter_options.noise_t=250", "trainer_options.group_size=3", "seed=1")


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, and its two streams."""

    code: int
    out: str
    err: str


class Commands:
    """Runs `rewardsr ...` in this process: imports cost more than the work itself does."""

    def __init__(self, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture, self._monkeypatch = capture, monkeypatch

    def __call__(self, *arguments: Any) -> Answer:
        """Run one command line."""
        self._monkeypatch.setattr(sys, "argv", ["rewardsr", *map(str, arguments)])
        self._capture.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code or 0
        out, err = self._capture.readouterr()
        return Answer(code, out, err)

    def finetune(self, base: Any, data: Any, output: Any, *more: Any, rewards: str = "psnr=0.5,detail=0.5") -> Answer:
        """A short run on the CPU; `more` comes last and overrides."""
        settings = [part for setting in QUICK for part in ("--set", setting)]
        where = ("--base", base, "--data", data, "--output", output, "--rewards", rewards)
        return self("finetune", *where, "--steps", 2, "--device", "cpu", *settings, *more)


def picked(ours: Tensor, recorded: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """What to compare of a tensor, and its recorded counterpart.

    The vectors hold it whole as `name`, or every k-th element of it, flattened, as `name@k`.
    """
    if name in recorded:
        assert ours.shape == recorded[name].shape, f"{name}: {tuple(ours.shape)}, not {tuple(recorded[name].shape)}"
        return ours, recorded[name]
    for key, theirs in recorded.items():
        whole, _, step = key.rpartition("@")
        if whole == name:
            ours = ours.flatten()[:: int(step)]
            assert ours.shape == theirs.shape, f"{key}: {len(ours)} elements, not {len(theirs)}"
            return ours, theirs
    raise KeyError(f"neither {name!r} nor '{name}@k' is among the recorded {', '.join(recorded)}")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file under a folder with a hash of its content; folders end in a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": ""
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }
