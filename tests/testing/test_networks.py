"""Tiny pipelines for tests."""

from pathlib import Path

import pytest

from rewardsr import load_adapter
from rewardsr.lora.fingerprint import differing
from rewardsr.testing import tiny_pipeline, untrained_pipeline


def test_tiny_pipelines_are_small_and_the_same_every_time(tmp_path) -> None:
    one, other = (tiny_pipeline(tmp_path / name, seed=3) for name in ("one", "other"))
    sizes = [path.stat().st_size for path in Path(one).rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


def test_an_unknown_family_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown family 'sd4': expected sd, upscaler, stablesr or flow"):
        tiny_pipeline(tmp_path, family="sd4")


def test_an_untrained_pipeline_has_random_weights_in_its_unet_alone(tmp_path) -> None:
    known = load_adapter("osediff", "embedded", noise_t=250)
    made = [
        load_adapter("osediff", untrained_pipeline(tmp_path / f"{seed}", seed=seed), noise_t=250) for seed in (0, 1)
    ]
    again = load_adapter("osediff", untrained_pipeline(tmp_path / "again"), noise_t=250)
    parts = [adapter.base_model.fingerprint for adapter in (known, *made, again)]
    assert differing(parts[0], parts[1]) == differing(parts[1], parts[2]) == ["unet"]
    assert parts[1] == parts[3]
