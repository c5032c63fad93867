"""pyiqa's metrics as rewards: direction, one score a sample, gradients, options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from skimage.data import astronaut
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import build, iqa
from rewardsr.rewards.base import Reward
from rewardsr.rewards.fidelity import PSNR, SSIM

pyiqa = pytest.importorskip("pyiqa")

Y_CHANNEL = {"test_y_channel": True, "color_space": "ycbcr"}


def photos(size: int = 64) -> Tensor:
    """(3, 3, size, size): one photo, differently lit."""
    crop = torch.from_numpy(astronaut()[60 : 60 + size, 180 : 180 + size].copy()).permute(2, 0, 1).float() / 255
    return torch.stack([crop, 0.6 * crop + 0.1, crop.flip(-1)])


def noisy(images: Tensor, sigma: float = 0.1) -> Tensor:
    return (images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def batch(hq: Tensor | None = None) -> Batch:
    return Batch(lq=torch.zeros(3, 3, 4, 4), hq=hq)


# ---- scores ----


def test_is_a_reward() -> None:
    reward = build("iqa:piqe")
    assert isinstance(reward, Reward)
    assert (reward.name, reward.kind, reward.needs_hq, reward.differentiable) == ("piqe", "detail", False, False)
    assert "Noncommercial" in reward.licence


def test_lower_is_better_is_negated() -> None:
    images = photos()
    metric = pyiqa.create_metric("piqe", device="cpu")
    assert metric.lower_better
    clean, bad = build("iqa:piqe")(images, batch()), build("iqa:piqe")(noisy(images, 0.3), batch())
    assert torch.allclose(clean, -metric(images).float())
    assert (bad < clean).all()


def test_higher_is_better_is_kept() -> None:
    assert torch.allclose(
        build("iqa:entropy")(photos(), batch()), pyiqa.create_metric("entropy", device="cpu")(photos())
    )


def test_directions_of_metrics_that_cannot_be_built_here() -> None:
    table = iqa.metrics()
    assert all(iqa._lower_better(table[name]) for name in ("lpips", "dists", "niqe", "brisque", "afine_nr"))
    assert not any(iqa._lower_better(table[name]) for name in ("musiq", "maniqa", "clipiqa", "ssim", "topiq_nr"))
    # DMM is a distance: 0 for equal images. pyiqa's table forgets to say so.
    assert iqa._lower_better(table["dmm"])


@pytest.mark.parametrize("metric", ["piqe", "gmsd", "nlpd", "entropy", "ssim"])
def test_one_score_a_sample(metric: str) -> None:
    reward, hq = build(f"iqa:{metric}"), photos()
    sr = noisy(hq)
    scores = reward(sr, batch(hq))
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    for row in range(3):
        alone = reward(sr[row : row + 1], batch(hq[row : row + 1]))
        assert alone.shape == (1,)
        assert float(alone) == pytest.approx(float(scores[row]), rel=1e-4)


@pytest.mark.parametrize("metric", ["gmsd", "nlpd", "ssim"])
def test_full_reference_metrics_prefer_hq(metric: str) -> None:
    reward, hq = build(f"iqa:{metric}"), photos()
    assert (reward.kind, reward.needs_hq) == ("fidelity", True)
    assert (reward(hq, batch(hq)) > reward(noisy(hq, 0.05), batch(hq))).all()
    assert (reward(noisy(hq, 0.05), batch(hq)) > reward(noisy(hq, 0.2), batch(hq))).all()


@pytest.mark.parametrize(("metric", "ours", "tolerance"), [("psnr", PSNR(), 1e-4), ("ssim", SSIM(), 1e-4)])
@pytest.mark.parametrize("sigma", [0.004, 0.05, 0.3])
def test_pyiqas_psnr_and_ssim_equal_ours(metric: str, ours: Reward, tolerance: float, sigma: float) -> None:
    theirs, hq = build(f"iqa:{metric}", **Y_CHANNEL), photos()
    assert theirs.name == f"iqa:{metric}"  # the plain name is ours
    for sr in (noisy(hq, sigma), (noisy(hq, sigma) * 255).round() / 255):
        assert torch.allclose(ours(sr, batch(hq)), theirs(sr, batch(hq)), rtol=0, atol=tolerance)


def test_options_change_the_metric() -> None:
    hq = photos()
    plain, luma = build("iqa:psnr")(noisy(hq), batch(hq)), build("iqa:psnr", **Y_CHANNEL)(noisy(hq), batch(hq))
    assert (luma - plain > 1).all()


def test_metrics_of_one_number_for_a_batch_are_called_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, hq = build("iqa:gmsd"), photos()
    expected = reward(noisy(hq), batch(hq))
    forward = reward._network.forward
    monkeypatch.setattr(reward._network, "forward", lambda *images: forward(*images).mean())
    assert torch.allclose(reward(noisy(hq), batch(hq)), expected)
    assert expected.unique().numel() == 3


def test_input_is_clamped_and_left_alone() -> None:
    hq = photos()
    sr = noisy(hq)
    sr[:, :, 0] = 1.2
    reward, before = build("iqa:gmsd"), (sr.clone(), hq.clone())
    assert torch.equal(reward(sr, batch(hq)), reward(sr.clamp(0, 1), batch(hq)))
    reward._network.register_forward_pre_hook(lambda _, images: [image.zero_() for image in images] and None)
    reward(sr, batch(hq))
    assert torch.equal(sr, before[0])
    assert torch.equal(hq, before[1])


def test_autocast_changes_nothing() -> None:
    reward, hq = build("iqa:gmsd"), photos()
    expected = reward(noisy(hq), batch(hq))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(noisy(hq), batch(hq)), expected)


def test_gradients_flow_where_they_can() -> None:
    hq = photos()
    sr = noisy(hq).requires_grad_()
    reward = build("iqa:gmsd")
    assert reward.differentiable
    before = reward(sr, batch(hq))
    (gradient,) = torch.autograd.grad(before.sum(), sr)
    assert (reward(sr.detach() + 1e-3 * gradient.sign(), batch(hq)) > before).all()
    with torch.no_grad():
        assert not reward(sr, batch(hq)).requires_grad
    assert not reward(sr.detach(), batch(hq)).requires_grad
    assert not build("iqa:piqe")(sr, batch()).requires_grad


def test_too_small_images() -> None:
    hq = photos(10)
    with pytest.raises(UserError, match="needs images of at least 11 pixels a side, not 10x10"):
        build("iqa:ssim")(hq, batch(hq))
    hq = photos(11)
    assert build("iqa:ssim")(hq, batch(hq)).isfinite().all()
    with pytest.raises(UserError, match="at least 161"):
        build("iqa:ms_ssim")(photos(), batch(photos()))


def test_missing_hq() -> None:
    with pytest.raises(UserError, match="reward 'gmsd' compares with HQ images"):
        build("iqa:gmsd")(photos(), batch())


# ---- options ----


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("musik", {}, "pyiqa has no metric 'musik': did you mean 'musiq'?"),
        ("fid", {}, "metric 'fid' cannot be a reward: it compares sets of images"),
        ("clipscore", {}, "it needs captions"),
        ("fgresq_pair", {}, "it ranks pairs"),
        ("psnr", {"color_spase": "ycbcr"}, "metric 'psnr' has no option 'color_spase': did you mean 'color_space'?"),
        ("maniqa", {"test_samples": 4}, "no option 'test_samples': did you mean 'test_sample'?"),  # it swallows them
        ("musiq", {"as_loss": True}, "no option 'as_loss'"),
        ("musiq", {"pretrained_model_path": "x.pth"}, "no option 'pretrained_model_path'"),
        ("piqe", {"crops": 4}, "metric 'piqe' does not average over crops"),
        (
            "maniqa",
            {"crops": 0},
            "options of metric 'maniqa': 'crops' is 0: input should be greater than or equal to 1",
        ),
        ("piqe", {"weights": __file__}, "metric 'piqe' takes no weights file"),
    ],
)
def test_bad_options(metric: str, options: dict[str, Any], message: str, offline: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(f"iqa:{metric}", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(offline.rglob("*.*"))


def test_pyiqa_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyiqa", None)
    iqa.metrics.cache_clear()
    with pytest.raises(UserError, match=r"pip install pyiqa .*Noncommercial"):
        build("iqa:musiq")
    iqa.metrics.cache_clear()
