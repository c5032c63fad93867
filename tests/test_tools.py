"""What made the embedded pipeline still makes one that the package can use."""

import torch

from rewardsr import Draws, load_adapter
from rewardsr.demo.photos import HELD_OUT
from rewardsr.testing import Replay
from tools import crops, train_pipeline


def test_a_saved_pipeline_runs_as_it_was_trained(tmp_path) -> None:
    parts = train_pipeline.build(seed=0)
    parts.vae.register_to_config(scaling_factor=train_pipeline.LATENT_STD)
    train_pipeline.save(parts, tmp_path / "pipeline")
    random = torch.Generator().manual_seed(0)
    lq = torch.rand(1, 3, 8, 8, generator=random)
    expected = train_pipeline.restore(train_pipeline.load(tmp_path / "pipeline"), lq, torch.Generator().manual_seed(1))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    adapter = load_adapter("osediff", tmp_path / "pipeline", noise_t=train_pipeline.NOISE_T, net_t=train_pipeline.NET_T)
    with torch.no_grad():
        sr = adapter.sample(adapter.encode(lq), Replay([noise]))
    assert float((sr - expected).abs().max()) < 1e-4
    with torch.no_grad():
        other = adapter.sample(adapter.encode(lq), Draws(0, 0, [0]))
    assert float((other - expected).abs().max()) > 1e-4, "the noise matters"


def test_training_pairs_are_drawn_from_their_seed_and_never_held_out() -> None:
    assert not set(crops.TRAIN) & set(HELD_OUT)
    one, other = (crops.Crops(["astronaut", "coins"], seed=3) for _ in range(2))
    lq, hq = one.batch(64, 3)
    assert lq.shape == (3, 3, 16, 16) and hq.shape == (3, 3, 64, 64)
    assert all(map(torch.equal, (lq, hq), other.batch(64, 3)))
    assert float(hq.min()) >= 0 and float(hq.max()) <= 1
