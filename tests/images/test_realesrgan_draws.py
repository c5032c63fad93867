"""What the Real-ESRGAN degradation draws, against the published numbers."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from rewardsr.data.degrade.drawn import Drawn, DrawnPass, draw_passes
from rewardsr.data.degrade.kernels import Hill, Sinc
from rewardsr.data.degrade.noise import Gaussian, Poisson
from rewardsr.data.degrade.settings import RealESRGANOptions

MANY = 4000
SIDE = 1600  # of HQ: factors show to a quarter of a percent and better
PI = math.pi


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    # Numbers of the noise are of no interest here, and take the time: a strip is as wide, and not as high.
    return [draw_passes(RealESRGANOptions(), 4, (4, SIDE), draws(seed)) for seed in range(MANY)]


def is_share(found: int, expected: float, of: int = MANY) -> bool:
    """Whether a count is one that chance explains: within four and a half standard deviations."""
    return abs(found - expected * of) <= 4.5 * math.sqrt(expected * (1 - expected) * of) + 0.5


def is_uniform(values: list[float], low: float, high: float) -> bool:
    """Whether values are spread evenly over a range, by Kolmogorov and Smirnov's test."""
    inside = min(values) >= low and max(values) <= high
    return inside and stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-5


@pytest.mark.parametrize("number", [0, 1])
def test_kernels(drawn, number) -> None:
    passes = [(own.first, own.second)[number] for own in drawn]
    kernels = [own.kernel for own in passes if own.kernel is not None]
    assert len(kernels) == MANY if number == 0 else is_share(len(kernels), 0.5)
    sincs = [kernel for kernel in kernels if isinstance(kernel, Sinc)]
    hills = [kernel for kernel in kernels if isinstance(kernel, Hill)]
    assert is_share(len(sincs), 0.1, len(kernels))
    sizes = Counter(kernel.size for kernel in kernels)
    assert set(sizes) == set(range(7, 22, 2))
    assert all(is_share(count, 1 / 8, len(kernels)) for count in sizes.values())
    assert is_uniform([kernel.cutoff for kernel in sincs if kernel.size < 13], PI / 3, PI)
    assert is_uniform([kernel.cutoff for kernel in sincs if kernel.size >= 13], PI / 5, PI)
    shares = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03}
    shares |= {"plateau_iso": 0.12, "plateau_aniso": 0.03}
    families = Counter(kernel.family for kernel in hills)
    assert all(is_share(families[family], share, len(hills)) for family, share in shares.items())  # type: ignore[index]
    for axis in (0, 1):
        assert is_uniform([kernel.sigma[axis] for kernel in hills], 0.2, (3.0, 1.5)[number])
    assert abs(np.corrcoef(np.array([kernel.sigma for kernel in hills]).T)[0, 1]) < 5 / math.sqrt(len(hills))
    assert is_uniform([kernel.rotation for kernel in hills], -PI, PI)
    for family, low, high in (("generalized", 0.5, 4.0), ("plateau", 1.0, 2.0)):
        betas = [kernel.beta for kernel in hills if kernel.family.startswith(family)]
        assert is_share(sum(beta > 1 for beta in betas), 0.5, len(betas))
        assert is_uniform([beta for beta in betas if beta > 1], 1, high)
        assert low == 1 or is_uniform([beta for beta in betas if beta < 1], low, 1)
        assert min(betas) >= low


def test_sinc_filters_cut_lower_from_13_pixels_on() -> None:
    options = RealESRGANOptions.model_validate({"kernel": {"sinc": 1.0}})
    lowest = dict.fromkeys(range(7, 22, 2), PI)
    for seed in range(1200):
        kernel = draw_passes(options, 4, (4, 4), draws(seed)).first.kernel
        assert isinstance(kernel, Sinc)
        lowest[kernel.size] = min(lowest[kernel.size], kernel.cutoff)
    for size, cutoff in lowest.items():
        assert cutoff >= PI / 3 if size < 13 else PI / 5 <= cutoff < PI / 4


@pytest.mark.parametrize("number", [0, 1])
def test_sizes(drawn, number) -> None:
    """The first pass goes by the size of HQ, the second by that of LQ."""
    passes: list[DrawnPass] = [(own.first, own.second)[number] for own in drawn]
    whole = (SIDE, SIDE // 4)[number]
    up, down = ((0.2, 0.7), (0.3, 0.4))[number]
    largest, smallest = ((1.5, 0.3), (1.2, 0.6))[number]
    widths = [own.size[1] for own in passes]
    larger, smaller = [w for w in widths if w > whole], [w for w in widths if w < whole]
    # A factor so close to 1 that the size stays counts as one that keeps it.
    assert is_share(len(larger), up * (1 - 1 / (whole * (largest - 1))))
    assert is_share(len(smaller), down)
    steady = [(w + 0.5) / whole for w in (*larger, *smaller)]
    assert is_uniform([f for f in steady if f > 1], 1 + 1 / whole, largest + 1 / whole)
    assert is_uniform([f for f in steady if f < 1], smallest, 1)
    modes = Counter(own.mode for own in passes) + Counter(own.mode for own in drawn)
    assert all(is_share(modes[mode], 1 / 3, 2 * MANY) for mode in ("area", "bilinear", "bicubic"))  # type: ignore[index]


@pytest.mark.parametrize("number", [0, 1])
def test_noise_and_jpeg(drawn, number) -> None:
    passes = [(own.first, own.second)[number] for own in drawn]
    gaussian = [own.noise for own in passes if isinstance(own.noise, Gaussian)]
    poisson = [own.noise for own in passes if isinstance(own.noise, Poisson)]
    assert is_share(len(gaussian), 0.5)
    assert is_uniform([255 * noise.sigma for noise in gaussian], 1, (15, 12)[number])
    assert is_uniform([noise.scale for noise in poisson], 0.05, (2.0, 1.0)[number])
    for some in (gaussian, poisson):
        assert is_share(sum(len(noise.numbers) == 1 for noise in some), 0.4, len(some))
    assert all(own.noise.numbers.shape[1:] == own.size for own in passes)
    qualities = Counter(own.quality for own in passes)
    wanted = range(60, (95, 100)[number] + 1)
    assert set(qualities) == set(wanted)
    assert all(is_share(count, 1 / len(wanted)) for count in qualities.values())


def test_the_end(drawn) -> None:
    sincs = [own.sinc for own in drawn if own.sinc is not None]
    assert is_share(len(sincs), 0.8) and is_share(sum(own.jpeg_last for own in drawn), 0.5)
    assert is_uniform([sinc.cutoff for sinc in sincs], PI / 3, PI)
    assert all(is_share(count, 1 / 8, len(sincs)) for count in Counter(sinc.size for sinc in sincs).values())


def test_choices_do_not_hang_together(drawn) -> None:
    """What one choice gives says nothing about any other."""
    rows = [
        [
            *(value for own in (one.first, one.second) for value in (own.quality, own.size[1], own.mode == "area")),
            *(isinstance(own.noise, Poisson) for own in (one.first, one.second)),
            *(len(own.noise.numbers) for own in (one.first, one.second)),
            *(isinstance(own.kernel, Sinc) for own in (one.first, one.second)),
            one.second.kernel is None,
            one.sinc is None,
            one.jpeg_last,
        ]
        for one in drawn
    ]
    together = np.corrcoef(np.array(rows, dtype=float).T)
    together[11, 12] = together[12, 11] = 0  # a blur that is left out is no sinc filter
    assert np.abs(together - np.eye(len(together))).max() < 5 / math.sqrt(len(rows))


def test_another_range_changes_what_it_is_about_and_nothing_else() -> None:
    plain, *others = (
        draw_passes(RealESRGANOptions.model_validate(options), 4, (64, 64), draws(3))
        for options in (
            {},
            {"first": {"sigma": (1, 2)}},
            {"first": {"gaussian": 0.0}},
            {"first": {"gaussian": 1.0, "gray": 0.0, "noise": (3, 3)}},
            {"first": {"up": 0.0, "down": 1.0}},
            {"kernel": {"sinc": 1.0}},
        )
    )
    for other in others:
        assert other.second.noise.numbers.equal(plain.second.noise.numbers)
        assert (other.second.size, other.second.quality, other.sinc) == (
            plain.second.size,
            plain.second.quality,
            plain.sinc,
        )
