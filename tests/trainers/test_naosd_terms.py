"""The terms of the supervised trainer that are 0 as published: the score by hand, its propriety, and what runs."""

import math
from pathlib import Path

import pytest
import torch
from _naosd import adapter_on, batch, left, make, recipe, write_base
from runs import lines
from torch import Tensor

import rewardsr
from rewardsr import Batch, Draws
from rewardsr.errors import UserError
from rewardsr.rewards import build, perceptual
from rewardsr.testing import check_trainer
from rewardsr.trainers.distillation import ENERGY_SMALLEST, energy_loss, energy_score
from rewardsr.trainers.naosd import NAOSD

TERMS = {"energy_weight": 2.0, "energy_apart": 0.9, "perceptual_weight": 0.3}
FLOOR = 1e-3  # what equal images are apart: the root of what is added under it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("terms"))


def update(images: int) -> Draws:
    return Draws(0, 0, range(images), "update-0")


def gradients(method: NAOSD, images: Batch, draws: Draws) -> Tensor:
    weights = method.trained_weights().values()
    for value in weights:
        value.grad = None
    for loss in method.losses(method.prepare(images, draws), draws):
        loss.value.backward()
    return torch.cat([value.grad.flatten() for value in weights])


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ---- the score ----


def pixel(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)


@pytest.mark.parametrize(
    ("x", "y", "h", "apart", "expected"),
    [
        (0.2, 0.6, 0.1, 1.0, 0.1),  # (.1 + .5) / 2 - .4 / 2
        (0.2, 0.6, 0.1, 0.5, 0.2),
        (0.2, 0.6, 0.1, 0.0, 0.3),
        (0.2, 0.6, 0.5, 1.0, 0.0),  # HQ lies between: nothing says that it is not drawn alike
    ],
)
def test_the_score_of_a_pixel(x, y, h, apart, expected) -> None:
    score = energy_score(pixel(x, y), pixel(h)[:, 0], 1, apart)
    assert float(score) == pytest.approx(expected, abs=1e-5)


def test_a_patch_is_a_root_mean_square_over_pixels_and_channels() -> None:
    target = torch.zeros(1, 2, 2, 5)
    one = target.clone()
    one[0, 1, 1, 0] = 4.0  # 16 / (2 channels, 4 pixels): sqrt(2) in the first patch of two
    one[..., 4] = 9.0  # fills no patch
    both = torch.stack([one, target], 1)
    near = (math.sqrt(2) + FLOOR) / 2
    assert float(energy_score(both, target, 2, 0)) == pytest.approx((near + FLOOR) / 2, abs=1e-6)
    assert float(energy_score(both, target, 2)) == pytest.approx(FLOOR / 2, abs=1e-6)


def test_images_and_their_detail() -> None:
    hq = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(energy_loss(torch.stack([hq, hq], 1), hq)) == pytest.approx(1.2 * FLOOR / 2, rel=1e-3)
    board = 0.1 * (1 - 2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2))
    brighter, rough = (torch.stack([hq + change, hq + change], 1) for change in (torch.tensor(0.1), board))
    # Both are 0.1 away, and their two draws not apart; detail is 8 times as far where neighbours differ in sign.
    assert float(energy_loss(brighter, hq)) == pytest.approx(0.1, abs=FLOOR)
    assert float(energy_loss(rough, hq)) == pytest.approx(0.1 + 0.2 * 0.8, abs=FLOOR)


def test_the_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    hq = torch.rand(1, 3, 9, 8, generator=random, dtype=torch.float64)
    draws = torch.rand(1, 2, 3, 9, 8, generator=random, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda sr: energy_loss(sr, hq, 0.7), draws)
    same = hq[:, None].expand(-1, 2, -1, -1, -1).clone().requires_grad_()
    energy_loss(same, hq).backward()
    assert same.grad is not None and not same.grad.any()


@pytest.mark.parametrize("patch", [1, 4])
def test_the_score_is_least_for_draws_that_are_distributed_as_hq_is(patch) -> None:
    hq, x, y = torch.randn(3, 4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    spreads = (0.5, 0.8, 1.0, 1.25, 2.0)

    def best(apart: float, shift: float = 0) -> tuple[float, float]:
        drawn = {s: float(energy_score(torch.stack([s * x, s * y], 1) + shift, hq, patch, apart)) for s in spreads}
        return min((score, s) for s, score in drawn.items())

    assert best(1.0)[1] == 1.0
    assert best(0.5)[1] == 0.5, "less apart: draws differ less"
    assert best(1.0, shift=0.3)[0] > best(1.0)[0]


# ---- the method ----


def test_keeps_the_contract() -> None:
    check_trainer(NAOSD, options={"lpips_weight": 0, **TERMS})


@pytest.mark.parametrize("more", [{}, {"vsd_weight": 0}])
def test_two_draws_of_each_image_and_the_terms_are_means_over_both(more, folder, monkeypatch) -> None:
    method, images, rows = make(adapter_on(folder), full="none", **TERMS, **more), batch(), []
    adapter, plain = method.adapter, method.adapter.predict
    monkeypatch.setattr(adapter, "predict", lambda z, *rest: rows.append(len(z)) or plain(z, *rest))
    losses = list(method.losses(method.prepare(images, update(2)), update(2)))
    assert rows == ([4] if more else [4, 4, 8, 4])
    draws = update(2)
    with torch.no_grad():
        sr = adapter.sample(adapter.encode(images, generator=draws).repeat(2), draws)
    first, second = sr[::2], sr[1::2]
    assert float((first - second).square().mean((1, 2, 3)).sqrt().min()) > 1e-3
    reward = build("perceptual")
    expected = {
        "mse": (4 * (first - images.hq).square().mean() + 4 * (second - images.hq).square().mean()) / 2,
        "perceptual": -0.3 * (reward(first, images).mean() + reward(second, images).mean()) / 2,
        "energy": 2 * energy_loss(torch.stack([first, second], 1), images.hq, 0.9),
    }
    found = losses[0].metrics
    assert {name for name in found if "/" in name} == {
        f"loss/{name}" for name in (*expected, *(() if more else ("vsd",)))
    }
    for name, value in expected.items():
        assert float(found[f"loss/{name}"]) == pytest.approx(float(value), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(sum(float(v) for n, v in found.items() if "/" in n), rel=1e-5)


@pytest.mark.parametrize("term", ["energy_weight", "perceptual_weight"])
def test_a_term_alone_reaches_all_that_upscales(term, folder) -> None:
    method = make(adapter_on(folder), full="all", mse_weight=0, vsd_weight=0, **{term: 1.0})
    gradients(method, batch(), update(2))
    assert all(value.grad.any() for value in method.trained_weights().values() if value.ndim > 1)


def test_parts_of_a_batch_and_checkpointed_networks_give_the_same_gradient(folder) -> None:
    """Parts as in `micro_batch`, and one image a process."""
    method, images = make(adapter_on(folder), full="none", **TERMS), batch(3)
    whole = gradients(method, images, update(3))
    method.micro_batch = 2
    assert off(gradients(method, images, update(3)), whole) < 1e-4
    alone = [gradients(method, images.rows(slice(row, row + 1)), Draws(0, 0, [row], "update-0")) for row in range(3)]
    assert off(torch.stack(alone).mean(0), whole) < 1e-4
    method.adapter.enable_gradient_checkpointing()
    assert off(gradients(method, images, update(3)), whole) < 1e-4


def test_a_run_that_goes_on_ends_like_a_straight_one(folder) -> None:
    plain = {"optimiser": {"schedule": "constant", "warmup": 0}, "trainer_options": {"lpips_weight": 0, **TERMS}}
    straight = rewardsr.finetune(recipe(folder, "straight", **plain)).output
    rewardsr.finetune(recipe(folder, "resumed", **plain | {"steps": 2}))
    resumed = rewardsr.finetune(recipe(folder, "resumed", **plain), resume=True).output
    ours, theirs = left(straight), left(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert lines(straight) == lines(resumed)
    assert {"loss/energy", "loss/perceptual", "loss/mse", "loss/vsd", "loss/fake"} <= lines(straight)[-2].keys()


# ---- what is refused ----


def test_draws_that_would_be_equal_are_refused(folder) -> None:
    still = adapter_on(folder, noise_t=None, net_t=None)
    with pytest.raises(UserError, match=r"energy_weight compares two draws .* deterministic .*noise_t") as caught:
        make(still, full="none", energy_weight=1.0)
    assert "\n" not in str(caught.value)


def test_an_absent_package_is_one_line(folder, monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'perceptual': the package .* is not installed; pip install") as caught:
        make(adapter_on(folder), full="none", perceptual_weight=1.0)
    assert "\n" not in str(caught.value)
    make(adapter_on(folder), full="none", energy_weight=1.0)


def test_images_that_a_term_cannot_take_are_refused(folder) -> None:
    for option, smallest in (("energy_weight", ENERGY_SMALLEST), ("perceptual_weight", perceptual.SMALLEST)):
        method = make(adapter_on(folder), full="none", **{option: 1.0})
        method.check_size((smallest, smallest + 4))
        with pytest.raises(UserError, match=rf"needs {smallest} pixels a side, not {smallest - 1}; or set {option}=0"):
            method.check_size((smallest + 4, smallest - 1))


def test_a_new_term_alone_is_something_to_train_on(folder) -> None:
    alone = {"full": "none", "mse_weight": 0, "vsd_weight": 0}
    with pytest.raises(UserError, match=r"nothing to train on: .*energy_weight, perceptual_weight are all 0"):
        make(adapter_on(folder), **alone)
    for option in ("energy_weight", "perceptual_weight"):
        make(adapter_on(folder), **alone, **{option: 1.0})
