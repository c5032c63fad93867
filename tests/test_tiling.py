"""Tiles: which latents are cut, into how many, and what becomes of the predictions."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from rewardsr.errors import UserError
from rewardsr.tiling import Tiling, Window


def tiles(tiling: Tiling, height: int, width: int) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Top, bottom, left and right of each tile that is predicted, and how many were predicted in each call."""
    seen, calls = [], []

    def predict(windows: Sequence[Window]) -> torch.Tensor:
        seen.extend((rows.start, rows.stop, columns.start, columns.stop) for rows, columns in windows)
        calls.append(len(windows))
        return torch.cat([z[..., rows, columns] for rows, columns in windows])

    z = torch.rand((2, 4, height, width), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tiling.apply(predict, z), z, atol=1e-5), "what depends on its place alone stays as it is"
    return seen, calls


@pytest.mark.parametrize(
    ("side", "overlap", "height", "width", "count"),
    [
        (96, 32, 128, 128, 4),
        (96, 32, 160, 160, 4),
        (96, 32, 161, 160, 6),
        (96, 32, 256, 192, 12),
        (64, 32, 128, 128, 9),
        (16, 4, 24, 20, 4),
        (8, 0, 16, 24, 6),
        (96, 32, 97, 96, 2),
        (96, 32, 24, 400, 25),
        (96, 32, 400, 24, 25),
        (96, 95, 48, 200, 153),
        (96, 0, 24, 400, 17),
        (96, 32, 4, 2400, 800),
    ],
)
def test_how_many_tiles(side, overlap, height, width, count) -> None:
    seen, calls = tiles(Tiling(side, overlap), height, width)
    assert len(calls) == math.ceil(count / 4) and max(calls) - min(calls) <= 1
    assert len(seen) == len(set(seen)) == count
    across = min(side, height, width)
    assert all(bottom - top == right - left == across for top, bottom, left, right in seen)
    least = overlap * across // side
    for begin in (0, 2):
        starts = sorted({tile[begin] for tile in seen})
        assert all(second - first <= across - least for first, second in pairwise(starts))


@pytest.mark.parametrize(
    ("at_once", "calls"), [(1, [1] * 9), (2, [1, 2, 2, 2, 2]), (4, [3, 3, 3]), (8, [4, 5]), (9, [9]), (100, [9])]
)
def test_tiles_go_together_and_the_sum_stays_as_it_is(at_once, calls) -> None:
    assert tiles(Tiling(64, 32, at_once), 128, 128) == (tiles(Tiling(64, 32, 1), 128, 128)[0], calls)


@pytest.mark.parametrize(
    ("height", "width", "cut"),
    [(96, 96, False), (48, 192, False), (192, 48, False), (9216, 1, False), (97, 96, True), (48, 193, True)],
)
def test_the_area_decides_and_not_the_sides(height, width, cut) -> None:
    """As in SeeSR and StableSR."""
    assert Tiling(96, 32).cuts(torch.zeros(1, 4, height, width)) is cut


@pytest.mark.parametrize(("side", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_tiles_that_cannot_be(side, overlap) -> None:
    with pytest.raises(UserError, match="expected 0 <= overlap < tile"):
        Tiling(side, overlap)
