"""Advantages: what counts as a difference between the outputs of a group, and what rounding must not decide."""

import math

import pytest
import torch

from rewardsr.trainers.preferences import group_advantages


def advantages(*metrics: list[float], weights: list[float] | None = None) -> list[float]:
    """Of one group, scored by several metrics."""
    scores = {str(place): torch.tensor([values]) for place, values in enumerate(metrics)}
    shares = weights or [1.0] * len(metrics)
    return group_advantages(scores, {name: torch.tensor([shares[int(name)]]) for name in scores})[0].tolist()


def above(value: float, steps: int = 1) -> float:
    """The float32 so many steps above."""
    number = torch.tensor(value)
    for _ in range(steps):
        number = torch.nextafter(number, torch.tensor(math.inf))
    return float(number)


@pytest.mark.parametrize("size", [0.7, 1e-6, 30.0, -5.0, 1e8])
@pytest.mark.parametrize("steps", [1, 8])
def test_rounding_is_a_tie(size, steps) -> None:
    """Min-max normalisation would stretch it to the whole range, and the group would teach noise at full strength."""
    assert advantages([size] * 5 + [above(size, steps)]) == [0] * 6


def test_a_small_difference_that_is_none_of_rounding_counts() -> None:
    """3e-5 of the scores' size: thirty times what a sum in float32 is off."""
    assert advantages([0.7, 0.7, 0.7 * (1 + 3e-5)]) == pytest.approx([-0.577, -0.577, 1.155], abs=1e-3)


def test_scores_around_zero_differ_by_their_own_measure() -> None:
    assert advantages([-1e-7, 0.0, 1e-7]) == pytest.approx([-1, 0, 1], abs=1e-5)


def test_a_tied_metric_leaves_the_choice_to_the_others() -> None:
    tied = [0.7, 0.7, above(0.7)]
    assert advantages(tied, [1.0, 2.0, 3.0]) == pytest.approx(advantages([1.0, 2.0, 3.0]), abs=1e-6)


def test_metrics_that_outweigh_each_other_are_a_tie() -> None:
    """What is left of x / 2 + (1 - x) / 6 + (1 - x) / 3 is rounding, too: of the sum, and not of the scores."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(6, generator=generator)
        scores[0], scores[1] = 0, 1  # the same stretch for all
        others = (1 - scores).tolist()
        assert advantages(scores.tolist(), others, others, weights=[0.3, 0.1, 0.2]) == [0] * 6


@pytest.mark.parametrize("size", [1e-12, 5e-7, 1.0, 1e6])
def test_only_the_shares_of_the_weights_count(size) -> None:
    """RFSR's weights are 5e-6 and 5e-7: the order they give is that of ten and one."""
    metrics = [1.0, 2.0, 4.0], [3.0, 1.0, 2.0]
    expected = advantages(*metrics, weights=[10.0, 1.0])
    assert advantages(*metrics, weights=[10 * size, size]) == pytest.approx(expected, abs=1e-5)
    assert expected[2] > 1


def test_weights_are_shared_out_for_each_image() -> None:
    scores = {"a": torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "b": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    found = group_advantages(scores, {"a": torch.tensor([3e-7, 0.0]), "b": torch.tensor([1e-7, 0.0])})
    assert found[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)
    assert found[1].tolist() == [0, 0], "an image without any weight has nothing to prefer"
