"""Tiles: which latents are cut, into how many, and what becomes of the predictions."""

from itertools import pairwise

import pytest
import torch

from rewardsr.errors import UserError
from rewardsr.tiling import Tiling


def tiles(tiling: Tiling, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of each tile that is predicted."""
    seen = []

    def predict(rows: slice, columns: slice) -> torch.Tensor:
        seen.append((rows.start, rows.stop, columns.start, columns.stop))
        return z[..., rows, columns]

    z = torch.rand((2, 4, height, width), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tiling.apply(predict, z), z, atol=1e-5), "what depends on its place alone stays as it is"
    return seen


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
def test_how_many_calls(side, overlap, height, width, count) -> None:
    seen = tiles(Tiling(side, overlap), height, width)
    assert len(seen) == len(set(seen)) == count
    across = min(side, height, width)
    assert all(bottom - top == right - left == across for top, bottom, left, right in seen)
    least = overlap * across // side
    for begin in (0, 2):
        starts = sorted({tile[begin] for tile in seen})
        assert all(second - first <= across - least for first, second in pairwise(starts))


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
