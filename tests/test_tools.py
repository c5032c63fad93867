"""What made the embedded pipeline still makes one that the package can use."""

from pathlib import Path

import pytest
import torch

from rewardsr import Draws, load_adapter
from rewardsr.testing import write_images
from tools import autoencoder, crops, prior, restorer


@pytest.fixture
def photographs(tmp_path) -> Path:
    write_images(tmp_path / "photographs", 2, 160)
    return tmp_path / "photographs"


def test_the_stages_of_its_training_make_a_pipeline(photographs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(autoencoder, "COUNT", 4)
    for stage in (prior, restorer):
        monkeypatch.setattr(stage, "SHAPES", ((64, 2),))
    autoencoder.train(photographs, tmp_path / "vae", steps=2, seed=0, lr=1e-3)
    autoencoder.train(photographs, tmp_path / "vae", steps=1, seed=0, lr=1e-3, steady=tmp_path / "vae")
    prior.train(photographs, tmp_path / "vae", tmp_path / "pipeline", steps=2, seed=0, lr=1e-3)
    restorer.train(photographs, tmp_path / "pipeline", tmp_path / "restorer", steps=2, seed=0, lr=1e-3)
    adapter = load_adapter("osediff", tmp_path / "restorer", noise_t=250, net_t=100)
    with torch.no_grad():
        sr = adapter.sample(adapter.encode(torch.rand(1, 3, 8, 8)), Draws(0, 0, [0]))
    assert sr.shape == (1, 3, 32, 32) and bool(sr.isfinite().all())


def test_training_pairs_are_drawn_from_their_seed(photographs) -> None:
    one, other = (crops.Crops(photographs, seed=3) for _ in range(2))
    lq, hq = one.batch(64, 3)
    assert lq.shape == (3, 3, 16, 16) and hq.shape == (3, 3, 64, 64)
    assert all(map(torch.equal, (lq, hq), other.batch(64, 3)))
    assert float(hq.min()) >= 0 and float(hq.max()) <= 1
    assert not torch.equal(hq[0], hq[1])


def test_levels_of_a_photograph_become_a_folder(photographs, tmp_path) -> None:
    crops.write_levels(photographs, tmp_path / "levels")
    assert sorted(path.name for path in (tmp_path / "levels").iterdir()) == ["000-0.png", "001-0.png"]
