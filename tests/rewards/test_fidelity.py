"""PSNR and SSIM: known values, an independent implementation (scikit-image), direction, gradients."""

import math

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards.base import Reward
from rewardsr.rewards.fidelity import PSNR, SSIM


def photo(size: int = 96) -> Tensor:
    """(1, 3, size, size) of a face, 8-bit values in [0, 1]."""
    crop = astronaut()[60 : 60 + size, 180 : 180 + size]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255


def noisy(image: Tensor, sigma: float, seed: int = 0) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + sigma * noise).clamp(0, 1)


def batch(hq: Tensor | None) -> Batch:
    return Batch(lq=torch.zeros(1 if hq is None else len(hq), 3, 4, 4), hq=hq)


def luma(image: Tensor) -> np.ndarray:
    """(H, W) luma of the first image, in double precision, from the standard's own numbers."""
    return (16 + np.tensordot((65.481, 128.553, 24.966), image[0].double().numpy(), 1)) / 255


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
def test_is_a_reward(reward: Reward) -> None:
    assert isinstance(reward, Reward)
    assert (reward.kind, reward.needs_hq, reward.differentiable) == ("fidelity", True, True)


def test_psnr_of_a_known_offset() -> None:
    # 0.1 more in every channel is 0.1 * 219/255 more luma.
    score = PSNR()(torch.full((1, 3, 8, 8), 0.6), batch(torch.full((1, 3, 8, 8), 0.5)))
    assert float(score) == pytest.approx(-20 * math.log10(0.1 * 219 / 255), abs=1e-3)


@pytest.mark.parametrize(("channel", "weight"), [(0, 65.481), (1, 128.553), (2, 24.966)])
def test_psnr_weighs_channels_as_rgb(channel: int, weight: float) -> None:
    sr = torch.zeros(1, 3, 8, 8)
    sr[:, channel] = 0.5
    assert float(PSNR()(sr, batch(torch.zeros(1, 3, 8, 8)))) == pytest.approx(
        -20 * math.log10(0.5 * weight / 255), abs=1e-3
    )


def test_psnr_does_not_round() -> None:
    hq = torch.full((1, 3, 8, 8), 0.5)
    expected = -10 * math.log10((0.1 * 219 / 255**2) ** 2 + 1e-8)
    assert float(PSNR()(hq + 0.1 / 255, batch(hq))) == pytest.approx(expected, abs=0.01)


def test_equal_images() -> None:
    hq = photo()
    assert float(PSNR()(hq, batch(hq))) == pytest.approx(80, abs=1e-3)
    assert float(SSIM()(hq, batch(hq))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.1])
def test_ssim_equals_scikit_image(sigma: float) -> None:
    hq = photo()
    sr = torch.nn.functional.avg_pool2d(noisy(hq, sigma), 3, stride=1, padding=1, count_include_pad=False)
    x, y = (np.round(luma(image) * 255) for image in (sr, hq))
    _, maps = structural_similarity(
        x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    inside = maps[5:-5, 5:-5]  # where the window fits
    assert float(SSIM()(sr, batch(hq))) == pytest.approx(inside.clip(0).mean(), abs=2e-4)


def test_more_noise_scores_lower() -> None:
    hq = photo()
    srs = torch.cat([noisy(hq, sigma) for sigma in (0.0, 0.02, 0.1, 0.4)])
    for reward in (PSNR(), SSIM()):
        scores = reward(srs, batch(hq.repeat(4, 1, 1, 1)))
        assert scores.dtype == torch.float32
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        assert len(set(scores.tolist())) == 4


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
def test_one_score_a_sample(reward: Reward) -> None:
    hq = torch.cat([photo(), photo().flip(-1) * 0.5, photo().roll(9, -1)])
    sr = noisy(hq, 0.1)
    scores = reward(sr, batch(hq))
    assert scores.shape == (3,)
    for row in range(3):
        alone = reward(sr[row : row + 1], batch(hq[row : row + 1]))
        assert float(alone) == pytest.approx(float(scores[row]), rel=1e-5)


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
def test_following_the_gradient_raises_the_score(reward: Reward) -> None:
    hq = photo(48)
    sr = noisy(hq, 0.1).requires_grad_()
    before = reward(sr, batch(hq))
    (gradient,) = torch.autograd.grad(before.sum(), sr)
    step = 1e-3 * gradient / gradient.abs().max()
    assert float(reward(sr.detach() + step, batch(hq))) > float(before.detach())


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradient_is_finite_for_equal_flat_images(reward: Reward, value: float) -> None:
    hq = torch.full((1, 3, 16, 16), value)
    sr = hq.clone().requires_grad_()
    reward(sr, batch(hq)).sum().backward()
    assert sr.grad is not None
    assert sr.grad.isfinite().all()


@pytest.mark.parametrize("size", [(10, 40), (7, 5), (2, 2), (1, 1)])
def test_ssim_of_small_images(size: tuple[int, int]) -> None:
    hq = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(SSIM()(hq, batch(hq)), torch.ones(2), atol=1e-5)
    assert (SSIM()(1 - hq, batch(hq)) < 0.95).all()


def test_ssim_of_opposite_structure_is_not_negative() -> None:
    hq = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 0 <= float(SSIM()(1 - hq, batch(hq))) < 0.01


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
def test_autocast_changes_nothing(reward: Reward) -> None:
    hq = photo()
    sr = noisy(hq, 0.1)
    expected = reward(sr, batch(hq))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(sr, batch(hq)), expected)


@pytest.mark.parametrize("reward", [PSNR(), SSIM()])
def test_bad_input(reward: Reward) -> None:
    with pytest.raises(UserError, match=f"reward '{reward.name}' compares with HQ images"):
        reward(photo(), batch(None))
    with pytest.raises(ValueError, match="one shape"):
        reward(photo(), batch(photo(48)))
    with pytest.raises(ValueError, match="one shape"):  # must not broadcast
        reward(photo().repeat(2, 1, 1, 1), batch(photo()))
