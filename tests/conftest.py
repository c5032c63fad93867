"""Shared set-up: nothing is fetched, and numbers do not depend on how many cores there are."""

import errno
import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once

import hypothesis
import pytest
import torch
from _data import DATA
from safetensors.torch import load_file

from rewardsr import progress

# Equal examples in every run, and no clock: a slow machine is no fault. Tests say how many they want.
hypothesis.settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _patience() -> None:
    """What a slow machine waits for is said by no test that counts lines; those of `progress` set it back."""
    progress.PATIENCE = 600.0


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the reference vectors."""
    return DATA


@pytest.fixture(scope="session")
def tiny() -> str:
    """A tiny Stable Diffusion 2.1 of random weights, in diffusers' folder layout."""
    return str(DATA / "tiny_sd21")


@pytest.fixture(scope="session")
def golden():
    """Loads the vectors that were measured on an original implementation, by name."""
    return lambda name: load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """The shipped tiny pipeline: smaller than `tiny`, four pixels to a latent."""
    from rewardsr.testing import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_seesr() -> str:
    """A tiny SeeSR of random weights, in the layout and with the names of the released one."""
    return str(DATA / "tiny_seesr")


@pytest.fixture(scope="session")
def hq_folder(tmp_path_factory) -> Path:
    """Three images of 48 pixels."""
    from rewardsr.testing import write_images

    return write_images(tmp_path_factory.mktemp("images") / "hq", 3, 48)


@pytest.fixture
def commands(capfd, monkeypatch):
    """Runs command lines in-process; see `_support.Commands`."""
    from _support import Commands

    return Commands(capfd, monkeypatch)


@pytest.fixture
def contacted(monkeypatch) -> list[object]:
    """Nothing leaves this process; who would have been contacted is listed."""
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return asked


@pytest.fixture
def refused(commands, tmp_path, contacted):
    """Runs a command that must be refused, and looks at what it left; returns the line that it printed."""

    from _support import snapshot

    def check(*arguments: object) -> str:
        return judged(lambda: commands(*arguments))

    def judged(call) -> str:
        before = snapshot(tmp_path)
        answer = call()
        assert answer.code == 2, answer.err + answer.out
        assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
        assert snapshot(tmp_path) == before
        assert not contacted
        return answer.err

    check.finetune = lambda *arguments, **options: judged(lambda: commands.finetune(*arguments, **options))
    return check


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_base, tiny_seesr) -> dict[str, str]:
    """A tiny base of every built-in adapter, by its name."""
    from rewardsr.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("bases")
    made = {"sd_upscaler": "upscaler", "stablesr": "stablesr"}
    return {kind: str(tiny_pipeline(folder / kind, family=family)) for kind, family in made.items()} | {
        "osediff": str(tiny_base),
        "seesr": str(tiny_seesr),
    }
