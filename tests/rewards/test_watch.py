"""The metrics that watch a run: values worked out by hand, and what the detector of grids says of real pictures."""

import math

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.data.images import list_images, read_image
from rewardsr.demo.photos import HELD_OUT
from rewardsr.errors import UserError
from rewardsr.options import parse
from rewardsr.rewards import build
from rewardsr.rewards.detail import high_frequencies
from rewardsr.rewards.watch import PeriodicPatternOptions
from rewardsr.testing import check_reward

NAMES = ("high_frequency", "high_frequency_lq", "color_shift", "clipping", "periodic_pattern")


def gray(values: Tensor) -> Tensor:
    """(1, 3, H, W) of (H, W)."""
    return values.expand(1, 3, *values.shape)


def small(image: Tensor) -> Tensor:
    return F.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


def score(name: str, sr: Tensor, lq: Tensor | None = None, hq: Tensor | None = None, **options) -> float:
    return float(build(name, **options)(sr, Batch(lq=small(sr) if lq is None else lq, hq=hq)))


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(name) -> None:
    reward = build(name)
    check_reward(reward)
    assert reward.needs_hq == (name == "high_frequency")
    assert reward.margin > 0


# ---- high frequencies ----


def noise(side: int, scale: float = 0.05) -> Tensor:
    return gray(0.5 + scale * torch.randn(side, side, generator=torch.Generator().manual_seed(0)))


def test_twice_the_energy_scores_minus_one_and_so_does_half() -> None:
    hq = noise(32)
    energy = float(high_frequencies(hq).square().mean())
    for factor in (2.0, 0.5):
        sr = 0.5 + math.sqrt(factor) * (hq - 0.5)
        expected = -abs(math.log2((factor * energy + 1 / 255**2) / (energy + 1 / 255**2)))
        assert score("high_frequency", sr, hq=hq) == pytest.approx(expected, abs=1e-4)
        assert expected == pytest.approx(-1, abs=0.02)
    assert score("high_frequency", hq, hq=hq) == 0
    with pytest.raises(UserError, match="high_frequency"):
        score("high_frequency", hq)


def test_a_step_of_known_energy() -> None:
    # One pixel of 1 on black, 11 pixels wide: what is left at a distance is minus the kernel, at the pixel 1 - k0^2.
    sr = torch.zeros(21, 21)
    sr[10, 10] = 1
    weights = torch.exp(-torch.arange(-5, 6).square() / (2 * 1.5**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    energy = float(kernel.square().sum() - kernel[5, 5] ** 2 + (1 - kernel[5, 5]) ** 2) / 21**2
    expected = -math.log2((energy + 1 / 255**2) * 255**2)
    assert score("high_frequency", gray(sr), hq=torch.zeros(1, 3, 21, 21)) == pytest.approx(expected, abs=1e-4)
    assert score("high_frequency_lq", gray(sr), lq=torch.zeros(1, 3, 5, 5)) == pytest.approx(expected, abs=1e-4)


def test_photographs_have_about_as_much_at_each_scale() -> None:
    off = [score("high_frequency_lq", read_image(path)[None]) for path in list_images(HELD_OUT)]
    assert min(off) > -2.6 and sum(off) / len(off) > -1.3


# ---- colours ----


def test_a_shift_of_gray_is_one_of_lightness() -> None:
    # L* = 116 Y^(1/3) - 16; sRGB 0.5 is Y = 0.21404 and L* = 53.389, sRGB 0.6 is Y = 0.31855 and L* = 63.223.
    sr, lq = torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 2, 2), 0.5)
    assert score("color_shift", sr, lq) == pytest.approx(-(63.223 - 53.389), abs=0.01)
    assert score("color_shift", sr, torch.full((1, 3, 2, 2), 0.6)) == pytest.approx(0, abs=1e-4)


def test_the_distance_of_red_and_green() -> None:
    red, green = (torch.eye(3)[place].reshape(1, 3, 1, 1).expand(1, 3, 4, 4) for place in (0, 1))
    # Lab of sRGB's red (53.24, 80.09, 67.20) and green (87.73, -86.18, 83.18).
    expected = math.dist((53.24, 80.09, 67.20), (87.73, -86.18, 83.18))
    assert score("color_shift", red, green) == pytest.approx(-expected, abs=0.2)


def test_texture_is_no_shift() -> None:
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert score("color_shift", gray(checks.float()), torch.full((1, 3, 2, 2), 0.5)) == pytest.approx(0, abs=1e-4)


# ---- ends of the range ----


def test_shares_of_dark_and_saturated_pixels() -> None:
    sr = torch.full((1, 3, 4, 4), 0.5)
    sr[0, :, 0, :2] = 2 / 255  # 2 of 16
    sr[0, 1, 1, :3] = 253 / 255  # 3 of 16, in one channel
    sr[0, :, 2, :] = 3 / 255  # not quite
    lq = torch.full((1, 3, 4, 4), 0.5)
    assert score("clipping", sr, lq) == pytest.approx(-5 / 16)
    lq[0, :, 3, :2] = 0  # as many dark ones, elsewhere
    assert score("clipping", sr, lq) == pytest.approx(-3 / 16)
    lq[0, :, 3, :] = 0  # more dark ones than sr has: that is no credit for the saturated
    assert score("clipping", sr, lq) == pytest.approx(-3 / 16)


# ---- grids ----


def checkerboard(side: int) -> Tensor:
    return ((torch.arange(side)[:, None] + torch.arange(side)) % 2).float() * 2 - 1


def lines(side: int, period: int) -> Tensor:
    """A pixel wide, across and down."""
    at = torch.arange(side) % period == 0
    return (at[:, None] | at).float()


def test_a_checkerboard_scores_its_amplitude() -> None:
    sr, lq = gray(0.5 + 3 / 255 * checkerboard(64)), torch.full((1, 3, 16, 16), 0.5)
    assert score("periodic_pattern", sr, lq) == pytest.approx(-3, abs=1e-3)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_lines_score_their_root_mean_square(period) -> None:
    # A share f of pixels is a higher: a standard deviation of a sqrt(f (1 - f)). Of that goes what the neighbouring
    # periods see where they do not fit into the image as often at each phase.
    share = 1 - (1 - 1 / period) ** 2
    sr, lq = gray(0.5 + 4 / 255 * lines(96, period)), torch.full((1, 3, 24, 24), 0.5)
    found, expected = -score("periodic_pattern", sr, lq), 4 * math.sqrt(share * (1 - share))
    assert 0.9 * expected < found < 1.001 * expected


def test_what_is_flat_or_too_small_scores_zero() -> None:
    assert score("periodic_pattern", torch.full((1, 3, 64, 64), 0.3)) == 0
    assert score("periodic_pattern", gray(0.5 + 0.1 * checkerboard(8)), torch.full((1, 3, 2, 2), 0.5)) == 0


def test_a_pattern_that_lq_has_is_none() -> None:
    lq = gray(0.5 + 0.2 * lines(32, 4))  # every 16 pixels once enlarged
    sr = F.interpolate(lq, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    assert score("periodic_pattern", sr, lq) > -0.5
    assert score("periodic_pattern", sr, torch.full((1, 3, 32, 32), 0.5)) < -5


def test_the_periods_are_an_option() -> None:
    sr, lq = gray(0.5 + 4 / 255 * lines(96, 6)), torch.full((1, 3, 24, 24), 0.5)
    assert score("periodic_pattern", sr, lq, periods=[6]) == pytest.approx(-4 * math.sqrt(11 / 36 * 25 / 36), abs=1e-3)
    with pytest.raises(UserError, match="periods"):
        parse(PeriodicPatternOptions, {"periods": [1]}, "options")


def test_photographs_raise_no_alarm_and_a_weak_grid_on_them_does() -> None:
    margin = build("periodic_pattern").margin
    clean, checked, lined = [], [], []
    for path in list_images(HELD_OUT):
        hq = read_image(path)[None]
        lq = small(hq)
        clean.append(score("periodic_pattern", hq, lq))
        checked.append(score("periodic_pattern", (hq + checkerboard(256) / 255).clamp(0, 1), lq))
        lined.append(score("periodic_pattern", (hq + 3 / 255 * lines(256, 8)).clamp(0, 1), lq))
    assert min(clean) > -margin and sum(clean) / len(clean) > -0.1
    assert max(checked) < -margin, "a level of 255"
    assert max(lined) < -margin


@pytest.mark.parametrize("scale", [1.0, 0.75, 0.5, 0.37, 0.25])
def test_bricks_raise_no_alarm(scale) -> None:
    wall = torch.from_numpy(skimage.data.brick()).float() / 255
    hq = F.interpolate(wall[None, None], scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)
    side = hq.shape[-1] // 4 * 4
    hq = hq[0, 0, :side, :side]
    assert score("periodic_pattern", gray(hq)) > -0.3
    assert score("periodic_pattern", gray((hq + checkerboard(side) / 255).clamp(0, 1)), small(gray(hq))) < -0.8
