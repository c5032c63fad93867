"""Rewards without a usable gradient are told from those that have one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import build, known
from rewardsr.rewards.detail import Sharpness
from rewardsr.rewards.probe import ADVICE, probe_gradient

# All but one, which needs weights.
DIFFERENTIABLE = [name for name, _, _, differentiable, _ in known() if differentiable and name != "imagereward"]


def batch(rows: int = 3, hq: bool = True, size: int = 32) -> Batch:
    images = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0))
    lq = torch.nn.functional.interpolate(images, scale_factor=0.25, mode="area")
    return Batch(lq=lq, hq=images if hq else None)


@pytest.mark.parametrize(
    "name", [name for name, _, _, differentiable, _ in known() if differentiable and name != "imagereward"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_built_ins_pass(name: str, rows: int) -> None:
    probe_gradient(name, build(name), batch(rows))
    with torch.no_grad():
        probe_gradient(name, build(name), batch(rows))
        assert not torch.is_grad_enabled()


def test_plain_images_pass() -> None:
    for value in (0.0, 0.5, 1.0):
        images = torch.full((1, 3, 32, 32), value)
        for name in ("psnr", "ssim", "detail", "detail_correlation", "lq_consistency"):
            probe_gradient(name, build(name), Batch(lq=images[..., ::4, ::4], hq=images))


def test_batch_is_left_alone() -> None:
    given = batch()
    assert given.hq is not None
    before = given.hq.clone()
    probe_gradient("psnr", build("psnr"), given)
    assert torch.equal(given.hq, before)
    assert not given.hq.requires_grad


def test_without_hq() -> None:
    probe_gradient("sharpness", build("sharpness"), batch(hq=False))
    with pytest.raises(UserError, match="compares with HQ images"):
        probe_gradient("psnr", build("psnr"), batch(hq=False))


class Silent(Sharpness):
    """Has a gradient, and says that it has none."""

    differentiable = False


class Detached(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return super().__call__(sr.detach(), batch)


class OwnGraph(Sharpness):
    """Its scores have a graph, which leads to a weight of its own only."""

    def __init__(self) -> None:
        self.weight = torch.ones(1, requires_grad=True)

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return self.weight * super().__call__(sr.detach(), batch)


class Rounded(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return super().__call__((sr * 255).round() / 255, batch)


class NotANumber(Sharpness):
    """Finite scores, and the gradient of a root at 0."""

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return super().__call__(sr, batch) + (sr - sr).square().sum((1, 2, 3)).sqrt()


class Swapped(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return super().__call__(sr, batch).flip(0)


class FirstCut(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        scores = super().__call__(sr, batch)
        return torch.cat([scores[:1].detach(), scores[1:]])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Silent, "it says so itself"),
        (Detached, "the graph from its scores to the images is cut"),
        (OwnGraph, "the graph from its scores to the images is cut"),
        (Rounded, "its gradient is zero everywhere"),
        (NotANumber, "its gradient is not finite"),
        (Swapped, "the gradient of an image's score does not reach that image"),
        (FirstCut, "the gradient of an image's score does not reach that image"),
    ],
)
def test_useless_gradients_are_refused(kind: type[Sharpness], says: str, rows: int) -> None:
    with pytest.raises(UserError) as caught, torch.no_grad():
        probe_gradient("mine", kind(), batch(rows))
    message = str(caught.value)
    assert message.startswith(f"reward 'mine' is not differentiable: {says}")
    assert message.endswith(f"; {ADVICE}")
    assert "\n" not in message


class Breaks(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        raise ZeroDivisionError("of\nall things")


class BreaksBackward(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        root = super().__call__(sr, batch).sqrt()
        scores = 2 * root
        root.zero_()  # which the gradient of the root needs
        return scores


class Mean(Sharpness):
    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        return super().__call__(sr, batch).mean()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Breaks, "reward 'mine' fails when its gradient is tried: ZeroDivisionError: of all things"),
        (BreaksBackward, "reward 'mine' fails when its gradient is tried: RuntimeError: one of the variables needed"),
        (Mean, "reward 'mine' gave () for 2 images, expected one score each"),
    ],
)
def test_broken_rewards_are_named(kind: type[Sharpness], says: str) -> None:
    with pytest.raises(UserError) as caught:
        probe_gradient("mine", kind(), batch())
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


# ---- pyiqa's ----


def test_pyiqa_metrics_without_gradient_are_refused() -> None:
    pytest.importorskip("pyiqa")
    with pytest.raises(UserError, match="reward 'piqe' is not differentiable: it says so itself; choose"):
        probe_gradient("piqe", build("iqa:piqe"), batch())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_clipiqa_passes(offline: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyiqa")
    from pyiqa.archs.clip_model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIP(  # a ResNet of one block a stage; the words are those of CLIP's tokenizer
            embed_dim=16,
            image_resolution=64,
            vision_layers=(1, 1, 1, 1),
            vision_width=8,
            vision_patch_size=None,
            context_length=77,
            vocab_size=49408,
            transformer_width=64,
            transformer_heads=1,
            transformer_layers=1,
        )
    for name, weight in clip.named_parameters():
        if name.endswith("bn3.weight"):  # CLIP starts with 0 there, and its blocks with no effect
            torch.nn.init.ones_(weight)
    # pyiqa reads CLIP's weights from a TorchScript archive only, as they were released.
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(clip.eval(), inputs, check_trace=False), tmp_path / "clip.pt")
    reward = build("iqa:clipiqa", weights=tmp_path / "clip.pt")
    assert reward.differentiable
    probe_gradient("clipiqa", reward, batch(1, size=64))
    with torch.no_grad():
        probe_gradient("clipiqa", reward, batch(2, size=64))
