"""Paired comparison: same noise, honest intervals, one image at a time."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from rewardsr import load_adapter, lora
from rewardsr.adapter import Batch
from rewardsr.draws import Draws
from rewardsr.errors import TrainingError, UserError
from rewardsr.evaluation.protocol import Comparison, Evaluation, bootstrap, compare
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.rewards.fidelity import PSNR


class Brightness:
    """Mean value; needs no HQ."""

    name = "brightness"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    kind = "detail"

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        return sr.mean((1, 2, 3))


class Broken(Brightness):
    """Gives whatever it is made with."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._scores


def batches(count: int, hq: bool = True) -> list[Batch]:
    result = []
    for number in range(count):
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        lq = torch.nn.functional.avg_pool2d(image, 4)
        result.append(Batch(lq, image if hq else None, paths=(f"folder/{number}.png",)))
    return result


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower with two threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapter(tiny):
    """A noisy one-step pipeline whose LoRA does something."""
    pipeline = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=4)
    lora.attach(pipeline, rank=2)
    for name, parameter in lora.parameters(pipeline).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return pipeline


# ---- bootstrap ----


def test_bootstrap_of_two_images_by_hand() -> None:
    """Means of two draws from {0, 1} are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: both ends lie in the tails."""
    assert bootstrap([0, 1], seed=0) == (0, 1)


def test_bootstrap_of_ten_images_by_hand() -> None:
    """Five wins of ten: the number of wins is binomial(10, 1/2); P(<= 1) = 0.011 and P(<= 2) = 0.055, so 2 to 8."""
    assert bootstrap([1, 0] * 5, seed=0) == pytest.approx((0.2, 0.8))


def test_bootstrap_of_equal_differences_is_a_point() -> None:
    assert bootstrap([0.25] * 7, seed=0) == (0.25, 0.25)


def test_bootstrap_nears_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 3000)  # more images than fit in one chunk of resamples
    margin = 1.96 * values.std() / math.sqrt(len(values))
    low, high = bootstrap(values, seed=0, resamples=4000)
    assert low == pytest.approx(values.mean() - margin, abs=0.1 * margin)
    assert high == pytest.approx(values.mean() + margin, abs=0.1 * margin)


def test_bootstrap_depends_on_its_seed_only() -> None:
    values = np.random.default_rng(1).normal(size=9).tolist()
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_bootstrap_of_one_image_says_nothing() -> None:
    assert all(math.isnan(end) for end in bootstrap([0.5], seed=0))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses(values) -> None:
    with pytest.raises(ValueError, match="finite number"):
        bootstrap(values, seed=0)


# ---- comparison ----


def test_comparison_by_hand() -> None:
    comparison = Comparison((1.0, 2.0, 3.0, 4.0), (1.5, 2.0, 5.0, 3.5), 0, 1)
    assert comparison.differences == (0.5, 0, 2, -0.5)
    assert (comparison.base_mean, comparison.tuned_mean, comparison.difference) == (2.5, 3.0, 0.5)
    assert comparison.improved == 0.5  # equal is not better


def test_worst_images() -> None:
    comparison = Comparison((0.0, 0.0, 0.0), (1.0, -1.0, 0.5), 0, 1)
    evaluation = Evaluation(("a", "b", "c"), {"x": comparison}, 0, 1, "none")
    assert evaluation.worst("x", 2) == [("b", -1.0), ("c", 0.5)]


# ---- evaluate ----


def test_scores_are_of_the_same_noise(adapter) -> None:
    images = batches(3)
    result = compare(adapter, images, {"psnr": PSNR(), "light": Brightness()}, seed=5, draws_per_image=2)
    assert result.images == ("0.png", "1.png", "2.png") and list(result.rewards) == ["psnr", "light"]
    for index, batch in enumerate(images):
        before, after = [], []
        for number in range(2):
            with lora.reference(adapter):
                sr = upscale_tensor(adapter, batch, generator=Draws(5, number, [index], "evaluate"))
            before.append(float(PSNR()(sr, batch)))
            sr = upscale_tensor(adapter, batch, generator=Draws(5, number, [index], "evaluate"))
            after.append(float(PSNR()(sr, batch)))
        assert result.rewards["psnr"].base[index] == pytest.approx(sum(before) / 2, abs=1e-5)
        assert result.rewards["psnr"].tuned[index] == pytest.approx(sum(after) / 2, abs=1e-5)
    assert result.rewards["psnr"].difference != 0
    assert (
        compare(adapter, images, {"psnr": PSNR()}, seed=5, draws_per_image=2).rewards["psnr"] == result.rewards["psnr"]
    )


def test_a_lora_that_does_nothing_makes_no_difference(adapter) -> None:
    lora.set_scale(adapter, 0)
    try:
        comparison = compare(adapter, batches(2), {"psnr": PSNR()}).rewards["psnr"]
    finally:
        lora.set_scale(adapter, 1)
    assert comparison.differences == (0, 0) and (comparison.low, comparison.high) == (0, 0)
    assert comparison.improved == 0


def test_another_base_to_compare_with(adapter) -> None:
    @contextmanager
    def itself(_) -> Iterator[None]:
        yield

    assert compare(adapter, batches(2), {"psnr": PSNR()}, base=itself).rewards["psnr"].differences == (0, 0)


def test_without_noise_one_draw_is_enough(tiny) -> None:
    pipeline = load_adapter("osediff", tiny, scale=4)
    assert compare(pipeline, batches(1), {"psnr": PSNR()}, draws_per_image=5).draws_per_image == 1


def test_images_come_one_at_a_time(adapter) -> None:
    """Nothing is asked for before the last image is done with."""
    done: list[int] = []

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(batches(3)):
            assert len(done) == number
            yield batch

    def on_image(position: int, batch: Batch, base: torch.Tensor, tuned: torch.Tensor) -> None:
        assert base.shape == tuned.shape == (1, 3, 16, 16) and not torch.equal(base, tuned)
        assert not tuned.requires_grad
        done.append(position)

    compare(adapter, stream(), {"light": Brightness()}, on_image=on_image, color_fix="adain")
    assert done == [0, 1, 2]


def test_json_round_trip(adapter) -> None:
    for count in (1, 3):
        result = compare(adapter, batches(count), {"psnr": PSNR()}, color_fix="wavelet")
        content = json.loads(result.to_json())
        assert Evaluation.from_dict(content).to_dict() == content
        assert content["color_fix"] == "wavelet" and content["rewards"]["psnr"]["improved"] in (0, 1 / 3, 2 / 3, 1)
        assert (content["rewards"]["psnr"]["interval"] == [None, None]) == (count == 1)


def test_refused(adapter) -> None:
    with pytest.raises(UserError, match="at least one reward"):
        compare(adapter, batches(1), {})
    with pytest.raises(UserError, match="no images"):
        compare(adapter, [], {"psnr": PSNR()})
    with pytest.raises(UserError, match=r"psnr compare.* HQ image, and 0\.png has none"):
        compare(adapter, batches(1, hq=False), {"psnr": PSNR(), "light": Brightness()})
    with pytest.raises(ValueError, match="one image, got 2"):
        compare(adapter, [Batch(torch.rand(2, 3, 4, 4))], {"light": Brightness()})
    with pytest.raises(ValueError, match="at least one draw"):
        compare(adapter, batches(1), {"psnr": PSNR()}, draws_per_image=0)
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(\)"):
        compare(adapter, batches(1), {"bad": Broken(torch.tensor(1.0))})
    with pytest.raises(TrainingError, match=r"'bad' gave nan for 0\.png \(base\)"):
        compare(adapter, batches(1), {"bad": Broken(torch.tensor([math.nan]))})
