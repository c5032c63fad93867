"""Real steps of every adapter and trainer on the fake device: no mix-up, no more copies and waits than stated."""

from typing import Any

import pytest
import torch
from _steps import ADAPTERS, Case, Measured, measure
from _tensors import MixUpError

from rewardsr.adapters import osediff
from rewardsr.rewards.fidelity import PSNR

GROUP = {"group_size": 2}
SHARED = {**GROUP, "preference": "conditional", "shared_noise": True}
PAPER = Case("osediff", "gdpo", "", GROUP)
ROWS = {
    **{f"{adapter}, gdpo": Case(adapter, "gdpo", "", GROUP) for adapter in ADAPTERS},
    **{f"{adapter}, rfsr": Case(adapter, "rfsr", "") for adapter in ADAPTERS},
    "osediff, naosd": Case("osediff", "naosd", ""),
    "micro-batch, naosd": Case("osediff", "naosd", "", {"micro_batch": 1, "full": "all"}, batch=2, checkpointing=True),
    **{f"{adapter}, upscale": Case(adapter, "upscale", "") for adapter in ADAPTERS},
    "shared noise, micro-batch": Case("osediff", "gdpo", "", {**SHARED, "micro_batch": 1}, batch=2, fixed_prompt=True),
    "checkpointing, micro-batch": Case("osediff", "gdpo", "", {**GROUP, "micro_batch": 1}, checkpointing=True),
    "checkpointing, crop": Case("osediff", "rfsr", "", {"reward_crop": 32}, batch=2, checkpointing=True),
    "tiled": Case("osediff", "upscale", "", {"tile": 8, "tile_overlap": 2}, side=96),
}

# Copies between host and device, and waits of the host for the device: in a step, or for an image, at most so many.
LIMITS = {
    "osediff, gdpo": (10, 1),
    "seesr, gdpo": (14, 1),
    "stablesr, gdpo": (12, 1),
    "sd_upscaler, gdpo": (12, 1),
    "osediff, rfsr": (17, 1),
    "seesr, rfsr": (20, 1),
    "stablesr, rfsr": (18, 1),
    "sd_upscaler, rfsr": (18, 1),
    "osediff, naosd": (11, 1),
    "micro-batch, naosd": (20, 1),
    "osediff, upscale": (3, 1),
    "seesr, upscale": (7, 2),
    "stablesr, upscale": (5, 1),
    "sd_upscaler, upscale": (5, 0),
    "shared noise, micro-batch": (8, 1),
    "checkpointing, micro-batch": (11, 1),
    "checkpointing, crop": (17, 1),
    "tiled": (4, 1),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_step_has_no_mix_up_and_waits_no_more_than_stated(row) -> None:
    found = measure(ROWS[row])
    assert found.total.flops > 0
    assert found.total.peak > found.resident > 0
    asked = "\n".join(f"{event.site} {event.operation} {event.bytes}" for event in found.events)
    copies, waits = LIMITS[row]
    assert found.copies <= copies, asked
    assert found.waits <= waits, asked


def test_noise_that_stays_on_the_host_fails(monkeypatch) -> None:
    draw = osediff.draw
    monkeypatch.setattr(osediff, "draw", lambda shape, generator, **_: draw(shape, generator))
    with pytest.raises(MixUpError, match=r"rewardsr/schedule\.py:\d+.* of the CPU beside"):
        measure(PAPER)


@pytest.fixture(scope="module")
def plain() -> Measured:
    return measure(PAPER)


def with_reward(monkeypatch, more: Any) -> Measured:
    """The step with something more in a reward."""
    score = PSNR.__call__

    def call(self, sr, batch):
        more(sr)
        return score(self, sr, batch)

    monkeypatch.setattr(PSNR, "__call__", call)
    return measure(PAPER)


def test_a_read_in_a_reward_is_seen_where_it_is_asked_for(plain, monkeypatch) -> None:
    found = with_reward(monkeypatch, lambda sr: sr.mean().item())
    assert found.waits == plain.waits + 1
    read = next(event for event in found.events if event.kind == "read")
    assert read.part == "rewards"
    assert read.site.startswith("rewardsr/trainers/groups.py:"), "the innermost line of the package"


def test_a_large_tensor_is_seen_at_its_size(plain, monkeypatch) -> None:
    size = 10 * 2**30
    found = with_reward(monkeypatch, lambda sr: torch.empty(size, dtype=torch.uint8, device="cuda"))
    assert size < found.total.peak < size + plain.total.peak
    assert found.parts["rewards"].peak == found.total.peak
    others = {part: cost.peak for part, cost in found.parts.items() if part != "rewards"}
    assert others == {part: cost.peak for part, cost in plain.parts.items() if part != "rewards"}
