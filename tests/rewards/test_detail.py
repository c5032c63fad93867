"""Detail, its correlation, sharpness and agreement with LQ: known values, direction, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from skimage.data import astronaut
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards.base import Reward
from rewardsr.rewards.detail import Detail, DetailCorrelation, LQConsistency, Sharpness


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
    [
        (Detail(), "detail", True),
        (DetailCorrelation(), "detail", True),
        (Sharpness(), "detail", False),
        (LQConsistency(), "fidelity", False),
    ],
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


# ---- detail_correlation ----

# Of two pixels a and b side by side, the blur of each sees the other with weight q on one side and itself elsewhere, so
# their high frequencies are q (a - b) and q (b - a). q is what lies to one side of the middle of 11 Gaussian weights of
# sigma 1.5: exp(-i^2 / 4.5) is 0.8007, 0.4111, 0.1353, 0.0286, 0.0039 for i = 1 to 5, together 1.3796.
SIDE = sum(math.exp(-(i**2) / 4.5) for i in range(1, 6))
Q = SIDE / (1 + 2 * SIDE)  # 0.3670
C = 1 / 255**2


def correlation(sr: Tensor, hq: Tensor) -> float:
    return float(DetailCorrelation()(sr, batch(hq)))


def two(contrast: float, level: float = 0.5) -> Tensor:
    """Two gray pixels side by side."""
    return torch.tensor([level - contrast / 2, level + contrast / 2]).expand(1, 3, 1, 2)


def noise_like(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blurred(image: Tensor, sigma: float) -> Tensor:
    side = 8 * round(sigma) + 1
    return gaussian_blur2d(image, (side, side), (sigma, sigma), border_type="replicate")


@pytest.mark.parametrize("contrast", [0.4, 0.2, 0.1, 0.02, 0.004, 0.0, -0.02, -0.2])
def test_correlation_of_two_pixels(contrast: float) -> None:
    x, y = Q * contrast, Q * 0.2
    expected = (x * y + C) / math.sqrt((x * x + C) * (y * y + C))
    assert correlation(two(contrast), two(0.2)) == pytest.approx(expected, abs=1e-5)


def test_correlation_of_two_pixels_in_figures() -> None:
    # q 0.2 = 0.0734 is nearly twenty levels of 255: next to that, c counts for nothing ...
    assert correlation(two(0.1), two(0.2)) == pytest.approx(0.9986, abs=1e-4)
    assert correlation(two(-0.2), two(0.2)) == pytest.approx(-0.9943, abs=1e-4)
    # ... and is all that there is without detail: sqrt(c) / sqrt(0.0734^2 + c) = 0.0039 / 0.0735.
    assert correlation(two(0), two(0.2)) == pytest.approx(0.0534, abs=1e-4)
    assert correlation(two(0.2), two(0)) == pytest.approx(0.0534, abs=1e-4)
    assert correlation(two(0, 0.7), two(0, 0.3)) == pytest.approx(1)
    assert correlation(two(0.2, 0.8), two(0.2, 0.3)) == pytest.approx(1, abs=1e-6)


def test_correlation_of_crossed_stripes_is_zero() -> None:
    # [[-, +], [-, +]] and [[-, -], [+, +]]: the products are +, -, -, +, and c over energy is left.
    columns = two(0.2).expand(1, 3, 2, 2)
    assert correlation(columns.mT, columns) == pytest.approx(C / ((Q * 0.2) ** 2 + C), abs=1e-5)


def test_correlation_weighs_channels() -> None:
    # Gray is 0.299 R + 0.587 G + 0.114 B: +0.2 in red and green beside -0.2 in blue is +0.2 * 0.772, the same sign.
    other = torch.cat([two(0.2)[:, :2], two(-0.2)[:, :1]], 1)
    assert correlation(other, two(0.2)) > 0.99
    assert correlation(torch.cat([two(-0.2)[:, :2], two(0.2)[:, :1]], 1), two(0.2)) < -0.99


def test_correlation_counts_where_hq_has_detail() -> None:
    # Period-2 stripes of contrast 0.4 on the left and 0.1 on the right. Crossed with HQ on one side, there is nothing
    # there: what is left is the other side's share, 4 of 5 or 1 of 5, but for the two cells that see both sides.
    stripes = (torch.arange(160) % 2).float().sub(0.5).expand(1, 3, 160, 160)
    contrast = torch.where(torch.arange(160) < 80, 0.4, 0.1)
    left = torch.arange(160) < 80
    hq = 0.5 + contrast * stripes
    assert correlation(torch.where(left, hq, 0.5 + contrast * stripes.mT), hq) == pytest.approx(0.8, abs=0.02)
    assert correlation(torch.where(left, 0.5 + contrast * stripes.mT, hq), hq) == pytest.approx(0.2, abs=0.02)
    # Where HQ is flat, sr may have anything: with one level of 255 in the root, flat cells weigh 1 / 50 of the others.
    hq = torch.where(left, hq, 0.5)
    assert correlation(torch.where(left, hq, 0.5 + 0.4 * stripes), hq) == pytest.approx(1, abs=0.04)


def test_correlation_does_not_depend_on_contrast_brightness_or_slow_shading() -> None:
    hq = 0.2 + 0.6 * photo()
    assert correlation(hq, hq) == pytest.approx(1, abs=1e-6)
    assert correlation(0.5 * hq + 0.1, hq) > 0.98  # but for details of about a level
    assert correlation(1.5 * hq - 0.25, hq) > 0.98
    # Each cell has its own contrast: a gain that varies over the image leaves what one correlation of all would not.
    gain = torch.linspace(-1.5, 1.5, 96).exp()
    fine = hq - blurred(hq, 1.5)
    assert correlation(0.5 + gain * fine, hq) > 0.9
    shade = torch.linspace(-0.15, 0.15, 96)
    assert correlation(hq + shade + shade[:, None], hq) > 0.98


def test_correlation_orders_what_sr_may_be() -> None:
    hq = photo()
    lq = F.interpolate(F.avg_pool2d(hq, 4), scale_factor=4, mode="bicubic")
    fine = hq - blurred(hq, 1.5)
    amount = F.avg_pool2d(fine.square(), 9, 1, 4, count_include_pad=False).sqrt()  # what HQ has at each place
    noise = noise_like((1, 1, 96, 96))
    noise = noise - blurred(noise, 1.5)
    texture = amount * noise / noise.std()
    images = {
        "hq": hq,
        "sharpened hq": sharpened(hq, 1),
        "half way": (lq + hq) / 2,
        "soft": blurred(hq, 1),
        "softer": blurred(hq, 2),
        "lq": lq,
        "sharpened lq": sharpened(lq, 6),
        "lq with texture": lq + texture,
        "shifted by 2": hq.roll(2, -1),
        "texture alone": blurred(hq, 6) + texture,
        "negative": 1 - hq,
    }
    expected = [1.0, 0.976, 0.965, 0.826, 0.564, 0.465, 0.421, 0.160, 0.148, 0.011, -0.973]  # as measured
    scores = {name: correlation(image, hq) for name, image in images.items()}
    assert list(scores.values()) == pytest.approx(expected, abs=0.02)

    # `detail` pays for sharpening and for texture that is not HQ's; it is the other half of the question.
    amounts = {name: float(Detail()(image.clamp(0, 1), batch(hq))) for name, image in images.items()}
    assert amounts["lq"] < min(amounts["sharpened lq"], amounts["lq with texture"]) - 0.5
    assert amounts["shifted by 2"] > -0.2 and amounts["negative"] > -1e-5


def test_correlation_of_unrelated_noise_is_zero() -> None:
    first, second = (0.5 + 0.1 * noise_like((1, 3, 256, 256), seed) for seed in (1, 2))
    assert abs(correlation(first, second)) < 0.02
    for share in (0.6, 0.8):  # of the standard deviation; the rest is noise of the same amount
        mixed = 0.5 + share * (second - 0.5) + math.sqrt(1 - share**2) * (first - 0.5)
        assert correlation(mixed, second) == pytest.approx(share, abs=0.02)


def test_correlation_falls_with_texture_where_hq_is_flat() -> None:
    hq = torch.full((1, 3, 32, 32), 0.5)
    scores = [correlation(hq + amount * noise_like((1, 1, 32, 32)), hq) for amount in (0, 0.003, 0.01, 0.1)]
    assert scores[0] == pytest.approx(1) and scores == sorted(scores, reverse=True) and scores[-1] < 0.05


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("flat", ["sr", "hq", "both", "left half", "neither"])
def test_correlation_has_finite_gradients(value: float, flat: str) -> None:
    image = photo(24)
    plain = torch.full_like(image, value)
    half = torch.where(torch.arange(24) < 16, plain, image)
    pairs = {"sr": (plain, image), "hq": (image, plain), "both": (plain, plain), "left half": (half, half)}
    sr, hq = pairs.get(flat, (image, image))
    sr = sr.clone().requires_grad_()
    score = DetailCorrelation()(sr, batch(hq))
    (gradient,) = torch.autograd.grad(score.sum(), sr)
    assert gradient.isfinite().all()
    # It is at its best where sr is HQ, and there only.
    assert bool(gradient.abs().max() < 1e-3) == (flat in ("both", "left half", "neither"))


# ---- the others ----


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


@pytest.mark.parametrize("reward", [Detail(), DetailCorrelation(), Sharpness(), LQConsistency()])
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


@pytest.mark.parametrize("reward", [Detail(), DetailCorrelation(), Sharpness(), LQConsistency()])
def test_following_the_gradient_raises_the_score(reward: Reward) -> None:
    hq = photo(48)
    sr = sharpened(hq, -0.7).requires_grad_()
    data = Batch(lq=F.avg_pool2d(hq, 4), hq=hq)
    before = reward(sr, data)
    (gradient,) = torch.autograd.grad(before.sum(), sr)
    assert gradient.isfinite().all()
    step = 1e-4 * gradient.sign()
    assert float(reward(sr.detach() + step, data)) > float(before.detach())


@pytest.mark.parametrize("reward", [Detail(), DetailCorrelation(), Sharpness(), LQConsistency()])
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
