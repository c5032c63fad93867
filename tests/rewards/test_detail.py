"""Detail, sharpness and agreement with LQ: known values, direction, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from skimage.data import astronaut
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards.base import Reward
from rewardsr.rewards.detail import Detail, LQConsistency, Sharpness


def photo(size: int = 96) -> Tensor:
    crop = astronaut()[60 : 60 + size, 180 : 180 + size]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255


def batch(hq: Tensor | None = None, lq: Tensor | None = None) -> Batch:
    return Batch(lq=torch.zeros(1, 3, 4, 4) if lq is None else lq, hq=hq)


def sharpened(image: Tensor, amount: float) -> Tensor:
    """Less (negative) or more high frequency."""
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (image + amount * (image - blurred)).clamp(0, 1)


@pytest.mark.parametrize(
    ("reward", "kind", "needs_hq"),
    [(Detail(), "detail", True), (Sharpness(), "detail", False), (LQConsistency(), "fidelity", False)],
)
def test_is_a_reward(reward: Reward, kind: str, needs_hq: bool) -> None:
    assert isinstance(reward, Reward)
    assert (reward.kind, reward.needs_hq, reward.differentiable) == (kind, needs_hq, True)


def test_sharpness_of_a_known_image() -> None:
    # Vertical stripes 0 1 0 1: inside, both horizontal neighbours differ by 1, so |Laplacian| is 2; at the left and
    # right edge one of them is the replicated pixel itself, so it is 1.
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 8, 8)
    assert float(Sharpness()(stripes, batch())) == pytest.approx((6 * 2 + 2 * 1) / 8)
    assert float(Sharpness()(torch.full((1, 3, 8, 8), 0.7), batch())) == pytest.approx(0, abs=1e-6)


def test_sharpness_weighs_channels() -> None:
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 8, 8).clone()
    stripes[:, :2] = 0  # blue alone
    assert float(Sharpness()(stripes, batch())) == pytest.approx(0.114 * 14 / 8)


def test_detail_of_a_known_image() -> None:
    # Inner columns of period-2 stripes of contrast c have |Laplacian| 2c, the outermost c: mean 1.75c over 8x8 pixels.
    stripes = (torch.arange(8) % 2).float().expand(1, 3, 8, 8)
    score = Detail()(0.5 * stripes, batch(hq=0.1 * stripes))
    assert float(score) == pytest.approx(-math.log((1.75 * 0.5 + 0.01) / (1.75 * 0.1 + 0.01)), rel=1e-5)


def test_detail_is_best_for_hq_itself() -> None:
    hq = photo()
    scores = [float(Detail()(sharpened(hq, amount), batch(hq))) for amount in (-1, -0.5, 0, 0.5, 2, 6)]
    assert scores[2] == 0
    assert scores[0] < scores[1] < scores[2]  # blurring costs
    assert scores[2] > scores[3] > scores[4] > scores[5]  # and so does sharpening past HQ


def test_detail_is_local() -> None:
    # The same amount of detail, in the other half of the image, is no agreement.
    hq = torch.full((1, 3, 16, 16), 0.5)
    hq[..., :8] = torch.rand(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    assert float(Detail()(hq.flip(-1), batch(hq))) < -1


def test_sharpness_rises_without_end() -> None:
    hq = photo()
    scores = [float(Sharpness()(sharpened(hq, amount), batch())) for amount in (-1, 0, 1, 3)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_lq_consistency_of_the_true_image(scale: int) -> None:
    hq = photo()
    lq = F.avg_pool2d(hq, scale)
    assert float(LQConsistency()(hq, batch(lq=lq))) == pytest.approx(0, abs=1e-6)
    assert float(LQConsistency()((hq + 0.05).clamp(0, 1), batch(lq=lq))) < -0.03


def test_lq_consistency_of_a_known_offset() -> None:
    score = LQConsistency()(torch.full((2, 3, 8, 8), 0.6), batch(lq=torch.full((2, 3, 4, 4), 0.5)))
    assert score.tolist() == pytest.approx([-0.1, -0.1])


def test_lq_consistency_ignores_what_lq_cannot_show() -> None:
    sr = torch.full((1, 3, 8, 8), 0.5)
    sr[..., ::2] += 0.2
    sr[..., 1::2] -= 0.2
    assert float(LQConsistency()(sr, batch(lq=torch.full((1, 3, 4, 4), 0.5)))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reward", [Detail(), Sharpness(), LQConsistency()])
def test_one_score_a_sample(reward: Reward) -> None:
    hq = torch.cat([photo(), photo().flip(-1) * 0.5, photo().roll(9, -1)])
    sr = sharpened(hq, -0.7)
    lq = F.avg_pool2d(hq, 4)
    scores = reward(sr, Batch(lq=lq, hq=hq))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    for row in range(3):
        alone = reward(sr[row : row + 1], Batch(lq=lq[row : row + 1], hq=hq[row : row + 1]))
        assert float(alone) == pytest.approx(float(scores[row]), rel=1e-5)


@pytest.mark.parametrize("reward", [Detail(), Sharpness(), LQConsistency()])
def test_following_the_gradient_raises_the_score(reward: Reward) -> None:
    hq = photo(48)
    sr = sharpened(hq, -0.7).requires_grad_()
    data = Batch(lq=F.avg_pool2d(hq, 4), hq=hq)
    before = reward(sr, data)
    (gradient,) = torch.autograd.grad(before.sum(), sr)
    assert gradient.isfinite().all()
    step = 1e-4 * gradient.sign()
    assert float(reward(sr.detach() + step, data)) > float(before.detach())


@pytest.mark.parametrize("reward", [Detail(), Sharpness(), LQConsistency()])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (8, 9)])
def test_odd_sizes_and_autocast(reward: Reward, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    data = Batch(lq=image, hq=image)
    expected = reward(image, data)
    assert expected.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(image, data), expected)


def test_bad_input() -> None:
    with pytest.raises(UserError, match="reward 'detail' compares with HQ images"):
        Detail()(photo(), batch())
    with pytest.raises(ValueError, match="one shape"):
        Detail()(photo(), batch(hq=photo(48)))
    with pytest.raises(ValueError, match="as many rows"):  # must not broadcast
        LQConsistency()(photo().repeat(2, 1, 1, 1), batch(lq=photo()))
    with pytest.raises(ValueError, match="not larger"):
        LQConsistency()(photo(48), batch(lq=photo(96)))
