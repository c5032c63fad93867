"""Shared by the tests of rewards."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _imagereward import WORDS, imagereward, released_state, save
from torch import Tensor

from rewardsr.hub import connection
from rewardsr.rewards.imagereward import ImageReward


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty caches in a folder, and no connection: whoever tries one nevertheless fails the test."""
    import huggingface_hub.constants
    import pyiqa.utils.download_util

    cache = tmp_path / "cache"
    cache.mkdir()
    attempts: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        attempts.append(address)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: connect(socket.socket(), "look-up"))
    monkeypatch.setattr(connection, "online", lambda timeout=3.0: False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(cache))
    monkeypatch.setattr(pyiqa.utils.download_util, "DEFAULT_CACHE_DIR", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield cache
    assert not attempts


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of BERT with a dozen words."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return path


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """The tensors of `weights`."""
    return released_state()


@pytest.fixture(scope="session")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ImageReward.pt."""
    return save(state, tmp_path_factory.mktemp("weights") / "ImageReward.pt")


@pytest.fixture(scope="session")
def reward(weights: Path, vocabulary: Path) -> ImageReward:
    """What `weights` and `vocabulary` make; not to be changed."""
    return imagereward(weights, vocabulary)
