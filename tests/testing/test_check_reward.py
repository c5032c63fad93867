"""`check_reward` finds what it is there to find, and says it."""

import pytest

from rewardsr.rewards.detail import Detail
from rewardsr.rewards.fidelity import PSNR
from rewardsr.testing import check_reward


class Mean(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch).mean()


class Integers(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch).round().long()


class Infinite(PSNR):
    def __call__(self, sr, batch):
        return super().__call__(sr, batch) / 0


class Relative(PSNR):
    def __call__(self, sr, batch):
        scores = super().__call__(sr, batch)
        return scores - scores.mean()


class Detached(Detail):
    def __call__(self, sr, batch):
        return super().__call__(sr.detach(), batch)


class Rounded(Detail):
    """Gradients are there, and all zero."""

    def __call__(self, sr, batch):
        return super().__call__((sr * 255).round() / 255, batch)


class Breaks(PSNR):
    def __call__(self, sr, batch):
        raise ZeroDivisionError("of all things")


class OtherKind(PSNR):
    kind = "taste"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Mean, "score: gave (), expected (3,)"),
        (Integers, "score: gave torch.int64, expected float32"),
        (Infinite, "score: gave values that are not finite"),
        (Relative, "a score depends on the other images of its batch"),
        (Detached, "its gradient is zero, not finite or cut"),
        (Rounded, "its gradient is zero, not finite or cut"),
        (Breaks, "raised ZeroDivisionError: of all things"),
        (OtherKind, "kind is 'taste'"),
    ],
    ids=lambda entry: entry.__name__ if isinstance(entry, type) else "says",
)
def test_a_broken_reward_is_caught(kind, says) -> None:
    with pytest.raises(AssertionError) as caught:
        check_reward(kind())
    assert says in str(caught.value), caught.value


def test_a_reward_that_lacks_an_attribute_is_told_which() -> None:
    with pytest.raises(AssertionError, match="attribute 'licence' is missing"):
        check_reward(type("Bare", (), {"name": "bare", "differentiable": False, "needs_hq": False})())
