"""What the tests of a run's order and numbers train on."""

from pathlib import Path

import pytest

from rewardsr.testing import tiny_pipeline, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images and a tiny pipeline."""
    made = tmp_path_factory.mktemp("train")
    write_images(made / "images", count=3, size=24)
    tiny_pipeline(made / "base")
    return made
