"""The Real-ESRGAN degradation: what it does with what is drawn, and how a recipe sets it."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from skimage.data import coffee
from torch import Tensor

from rewardsr.data.degrade.contract import degradation_options, make_degradation
from rewardsr.data.degrade.drawn import Drawn, draw_passes
from rewardsr.data.degrade.kernels import Hill, Sinc
from rewardsr.data.degrade.noise import Gaussian, Poisson, _poisson
from rewardsr.data.degrade.realesrgan import RealESRGAN
from rewardsr.data.degrade.settings import RealESRGANOptions
from rewardsr.errors import UserError
from rewardsr.train.recipe import DegradationRecipe

COFFEE = torch.from_numpy(coffee()).permute(2, 0, 1).float() / 255  # 400x600


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made(**options: Any) -> RealESRGAN:
    return RealESRGAN(RealESRGANOptions.model_validate(options), 4)


def photo(side: int, place: int = 0) -> Tensor:
    """(1, 3, side, side) out of a photograph."""
    top, left = 13 * place % (400 - side), 29 * place % (600 - side)
    return COFFEE[None, :, top : top + side, left : left + side].contiguous()


def is_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether images differ as by rounding, which turns single pixels and blocks of JPEG over (0.08 levels, seen)."""
    off = (one - other).abs() * 255
    return float(off.mean()) < 0.2 and float(off.max()) < 16


# ---- what is done with it ----


def in_plain_words(hq: Tensor, own: Drawn) -> Tensor:
    """The degradation of one image (3, H, W) once more, step by step, by other means where there are any."""

    def blurred(image: Tensor, kernel: Hill | Sinc | None) -> Tensor:
        if kernel is None:
            return image
        padded = F.pad(image[None], (kernel.size // 2,) * 4, mode="reflect")[0]
        return F.conv2d(padded[:, None], kernel.tensor().float()[None, None])[:, 0]

    def resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        return F.interpolate(image[None], size=size, mode=mode)[0]

    def noisy(image: Tensor, noise: Gaussian | Poisson) -> Tensor:
        if isinstance(noise, Gaussian):
            return image + noise.sigma * noise.numbers
        x = image
        if len(noise.numbers) == 1:
            x = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None]
        x = (x.clamp(0, 1) * 255).round() / 255
        v = 2 ** math.ceil(math.log2(len(x.unique())))
        counts = stats.poisson.ppf((noise.numbers.numpy() + 0.5) / 2**22, (x * v).numpy())
        return image + noise.scale * (torch.from_numpy(counts).float() / v - x)

    def saved(image: Tensor, quality: int) -> Tensor:
        buffer = io.BytesIO()
        array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255

    image = resized(blurred(hq, own.first.kernel), own.first.size, own.first.mode)
    image = saved(noisy(image, own.first.noise), own.first.quality)
    image = resized(blurred(image, own.second.kernel), own.second.size, own.second.mode)
    image = noisy(image, own.second.noise).clamp(0, 1)
    if not own.jpeg_last:
        image = saved(image, own.second.quality)
    image = blurred(resized(image, (hq.shape[1] // 4, hq.shape[2] // 4), own.mode), own.sinc)
    if own.jpeg_last:
        image = saved(image, own.second.quality)
    return (image.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("seed", range(24))
def test_every_step_is_taken_in_its_order(seed) -> None:
    hq = photo(160, seed)[0, :, :128]
    one = made()(hq[None], draws(seed))[0]
    other = in_plain_words(hq, draw_passes(RealESRGANOptions(), 4, (128, 160), *draws(seed)))
    assert is_rounding(one, other)


def test_a_sample_is_the_same_alone_and_in_any_batch() -> None:
    images = torch.cat([photo(96, seed) for seed in range(5)])
    alone = [made()(images[k : k + 1], draws(k)) for k in range(5)]
    for order in ([0, 1, 2, 3, 4], [4, 2], [3, 3, 1]):
        batch = made()(images[order], draws(*order))
        assert batch.shape == (len(order), 3, 24, 24)
        for place, k in enumerate(order):
            assert is_rounding(batch[place], alone[k][0])
    assert not torch.equal(made()(images[:1], draws(7)), alone[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_makes_what_the_cpu_makes() -> None:
    images = torch.cat([photo(256, seed) for seed in range(8)])
    here, there = made()(images, draws(*range(8))), made()(images.cuda(), draws(*range(8)))
    assert there.is_cuda
    assert all(is_rounding(one, other) for one, other in zip(here, there.cpu(), strict=True))


def test_output_is_in_8_bits_and_lq_sized() -> None:
    for scale in (1, 2, 4):
        lq = RealESRGAN(RealESRGANOptions(), scale)(photo(64)[..., :48], draws(0))
        assert lq.shape == (1, 3, 64 // scale, 48 // scale) and lq.dtype == torch.float32
        levels = lq * 255
        assert (levels - levels.round()).abs().max() < 1e-4 and lq.min() >= 0 and lq.max() <= 1


STILL = {"blur": 0.0, "up": 0.0, "down": 0.0, "poisson": (0, 0), "noise": (0, 0), "quality": (100, 100)}
STILL_LAST = STILL | {"sinc": 0.0}


@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_the_level_of_gaussian_noise(gray) -> None:
    flat = torch.full((1, 3, 128, 128), 0.5)
    noise = {"gaussian": 1.0, "noise": (12, 12), "gray": gray}
    lq = RealESRGAN(RealESRGANOptions.model_validate({"first": STILL | noise, "second": STILL_LAST}), 1)(flat, draws(0))
    luma = rgb_to_luma(lq)
    # Three independent channels leave the root of .299^2 + .587^2 + .114^2 of it in the luma.
    assert float(luma.std() * 255) == pytest.approx(12 if gray else 12 * 0.669, rel=0.05)
    spread = (lq - lq.mean(1, keepdim=True)).abs().mean() * 255
    assert spread == 0 if gray else spread > 1.5  # JPEG halves the resolution of colour


@pytest.mark.parametrize("levels", [1, 3, 200])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_level_of_poisson_noise(levels, scale) -> None:
    """Its variance is x / v * scale^2; v is the number of different values, rounded up to a power of two."""
    x = torch.linspace(0.2, 0.8, levels).mul(255).round().div(255)
    image = x[torch.arange(512 * 600) % levels].reshape(1, 512, 600).expand(3, -1, -1)
    different = len(image.unique())
    v = {1: 1, 3: 4}.get(different, 256 if different > 128 else 128)
    for channels in (1, 3):
        noise = Poisson(scale, Poisson.drawn((channels, 512, 600), *draws(1)))(image) - image
        assert abs(float(noise.mean())) < 5 * scale * math.sqrt(0.5 / v / (512 * 600))
        assert float(noise.var()) == pytest.approx(float(image.mean()) / v * scale**2, rel=0.03)
        assert torch.equal(noise[0], noise[1]) == (channels == 1) or torch.allclose(noise[0], noise[1], atol=1e-6)


@pytest.mark.parametrize("v", [1, 2, 64, 256])
@pytest.mark.parametrize("level", [1, 100, 255])
def test_poisson_counts_have_their_distribution(v, level) -> None:
    numbers = Poisson.drawn((1, 500, 500), *draws(v + level))
    counts = _poisson(torch.full((1, 500, 500), level, dtype=torch.int32), v, numbers).flatten().numpy()
    rate = level / 255 * v
    found = np.bincount(counts)
    expected = stats.poisson.pmf(np.arange(len(found)), rate) * counts.size
    enough = expected > 20
    chi2 = ((found - expected)[enough] ** 2 / expected[enough]).sum()
    assert stats.chi2(max(1, enough.sum() - 1)).sf(chi2) > 1e-5
    exact = stats.poisson.ppf((numbers.flatten()[:20000].numpy() + 0.5) / 2**22, rate)
    assert (exact != counts[:20000]).mean() < 1e-3


def rgb_to_luma(image: Tensor) -> Tensor:
    return 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]


def blocks(lq: Tensor) -> float:
    """How much larger steps across borders of 8x8 blocks are than all others."""
    steps = (lq[..., 1:] - lq[..., :-1]).abs().mean((0, 1, 2))
    across = torch.arange(len(steps)) % 8 == 7
    return float(steps[across].mean() / steps[~across].mean())


def test_jpeg_leaves_blocks_where_it_comes_last() -> None:
    images = torch.cat([photo(256, seed) for seed in range(4)])
    found = {}
    for last in (0.0, 1.0):
        # In the one case the blocks are of a larger image, and made smaller, which moves them off the grid.
        end = STILL_LAST | {"quality": (12, 12), "up": 1.0, "up_factor": (1.2, 1.2), "jpeg_last": last}
        options = RealESRGANOptions.model_validate({"first": STILL, "second": end})
        found[last] = blocks(RealESRGAN(options, 1)(images, draws(0, 1, 2, 3)))
    assert found[1.0] > 1.5 > 1.2 > found[0.0]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    state = torch.get_rng_state()
    made()(photo(64), draws(0))
    assert torch.equal(torch.get_rng_state(), state)


# ---- in a recipe ----


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"first": {"noise": [9, 3]}}, "'first.noise' is [9, 3]: expected the lower end of a range first"),
        ({"second": {"noise": [0, 300]}}, "'second.noise.1' is 300"),
        ({"first": {"up": 0.6, "down": 0.5}}, "up and down, which are probabilities, add up to 1.1: more than 1"),
        ({"first": {"up_factor": [0.9, 1.5]}}, "'first.up_factor.0' is 0.9"),
        ({"first": {"down_factor": [0.3, 1.1]}}, "'first.down_factor.1' is 1.1"),
        ({"first": {"down_factor": [0, 1]}}, "'first.down_factor.0' is 0"),
        ({"second": {"quality": [0, 100]}}, "'second.quality.0' is 0"),
        ({"second": {"quality": [60, 101]}}, "'second.quality.1' is 101"),
        ({"second": {"sinc": 1.5}}, "'second.sinc' is 1.5"),
        ({"second": {"sinc_cutoff": [1, 4]}}, "'second.sinc_cutoff.1' is 4"),
        ({"first": {"sinc": 0.5}}, "unknown key 'first.sinc'"),
        ({"first": {"sigma": [0, 3]}}, "'first.sigma.0' is 0"),
        ({"kernel": {"size": [8, 21]}}, "'kernel.size' is [8, 21]: expected odd sizes"),
        ({"kernel": {"size": [21, 7]}}, "'kernel.size' is [21, 7]: expected the lower end of a range first"),
        (
            {"kernel": {"generalized_beta": [1.5, 4]}},
            "'kernel.generalized_beta' is [1.5, 4]: expected a range around 1",
        ),
        ({"kernel": {"family": {"iso": 0.5}}}, "the shares of the kernels' families add up to 1.05, not 1"),
        ({"kernel": {"family": {"isotropic": 1}}}, "unknown key 'kernel.family.isotropic'"),
        ({"modes": []}, "'modes' is []"),
        ({"modes": ["nearest"]}, "'modes.0' is 'nearest'"),
        ({"gray": 0.4}, "unknown key 'gray'"),
    ],
)
def test_impossible_ranges(section, message) -> None:
    with pytest.raises(UserError) as caught:
        make_degradation(DegradationRecipe.model_validate({"name": "realesrgan"} | section), 4)
    assert message in str(caught.value) and "data.degradation (realesrgan)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_may_change_one_number() -> None:
    """The others keep the defaults of their pass, and all are written out."""
    section = DegradationRecipe.model_validate({"name": "realesrgan", "second": {"noise": [0, 2]}})
    written = degradation_options(section)
    assert written["second"]["noise"] == [0, 2] and written["second"]["poisson"] == [0.05, 1.0]
    assert written["first"]["poisson"] == [0.05, 2.0]
    assert degradation_options(DegradationRecipe.model_validate(written)) == written
