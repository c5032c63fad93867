"""Shared by the tests of rewards."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardsr import hub


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
    monkeypatch.setattr(hub, "online", lambda timeout=3.0: False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(cache))
    monkeypatch.setattr(pyiqa.utils.download_util, "DEFAULT_CACHE_DIR", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield cache
    assert not attempts
