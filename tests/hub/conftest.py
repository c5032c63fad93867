"""A finished run, and a Hub on 127.0.0.1 to send it to."""

import shutil
from pathlib import Path

import pytest
from _publishing import connected, make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_base) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", tiny_base)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path / "cache") as server:
        yield server
