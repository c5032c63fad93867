"""Several sources in one stream: exact shares, epochs of each source, and order from (seed, index) alone."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.order import BLOCK, Order
from rewardsr.errors import UserError
from rewardsr.testing import write_images
from rewardsr.train.recipe import SourceRecipe

LIGHT = Light(LightOptions(), 4)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    return write_images(tmp_path / "many", 5, 24), write_images(tmp_path / "few", 2, 24)


def opened(folders, *shares: float | None, **options) -> Data:
    sources = [SourceRecipe(path=str(folder), probability=share) for folder, share in zip(folders, shares, strict=True)]
    return open_data(sources, **{"scale": 4, "crop": 16, "degradation": LIGHT, **options})


def test_without_probabilities_all_images_are_one_set(folders) -> None:
    data = opened(folders, None, None)
    for epoch in range(3):
        shown = [data.item(4, index) for index in range(7 * epoch, 7 * epoch + 7)]
        assert Counter(shown) == Counter(data.items)


def test_every_block_has_its_shares_and_every_source_its_epochs(folders) -> None:
    data = opened(folders, 0.25, 0.75)
    blocks = [[data.item(1, BLOCK * block + place) for place in range(BLOCK)] for block in range(2)]
    assert [sum(item.source for item in block) for block in blocks] == [750, 750]
    assert [item.source for item in blocks[0]] != [item.source for item in blocks[1]]
    for number, count in enumerate((5, 2)):
        own = [item for block in blocks for item in block if item.source == number]
        whole = len(own) // count * count
        assert all(len(set(own[start : start + count])) == count for start in range(0, whole, count))
    first = [sum(item.source for item in blocks[0][start : start + 100]) for start in range(0, BLOCK, 100)]
    assert all(60 <= found <= 90 for found in first)  # they are mixed, not one after another


def test_order_follows_from_seed_and_index(folders) -> None:
    whole = opened(folders, 0.5, 0.5).batch(3, range(990, 1010))
    for parts in ([range(990, 1000), range(1000, 1010)], [range(990, 1010, 2), range(991, 1010, 2)]):
        made = [opened(folders, 0.5, 0.5, cache_mb=0, workers=2).batch(3, part) for part in reversed(parts)][::-1]
        where = [index - 990 for part in parts for index in part]
        lq = torch.cat([batch.lq for batch in made])
        assert torch.equal(lq, whole.lq[where])
    other = [opened(folders, 0.5, 0.5).item(seed, index).source for seed in (3, 4) for index in range(50)]
    assert other[:50] != other[50:]


def test_one_source_with_a_share_is_as_one_without(folders) -> None:
    plain, shared = open_data(folders[0], scale=4, crop=16, degradation=LIGHT), opened(folders[:1], 1.0)
    assert [plain.item(0, index) for index in range(20)] == [shared.item(0, index) for index in range(20)]


def test_thirds_are_whole_in_a_block() -> None:
    order = Order([0, 1, 2], [0.33, 0.33, 0.34])
    assert Counter(order.place(0, index) for index in range(BLOCK)) == {0: 330, 1: 330, 2: 340}
    uneven = Order([0, 1, 2], [1 / 3] * 3)
    assert sorted(Counter(uneven.place(0, index) for index in range(BLOCK)).values()) == [333, 333, 334]


def test_a_share_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match=r"a probability of 0\.0001 is less than one of 1000 samples"):
        Order([0, 1], [0.9999, 0.0001])


def test_shares_are_part_of_the_identity(folders) -> None:
    plain, half, third = (opened(folders, *shares).identity() for shares in ((None, None), (0.5, 0.5), (0.3, 0.7)))
    assert len({plain, half, third}) == 3
    assert half == opened(folders, 0.5, 0.5).identity()


def test_shares_hold_when_damaged_images_are_left_out(folders) -> None:
    bad = folders[0] / "001.png"
    bad.write_bytes(bad.read_bytes()[:300])
    data = opened(folders, 0.5, 0.5, max_unreadable=0.5)
    data.check()
    assert len(data) == 6 and bad not in {item.hq for item in data.items}
    assert Counter(data.item(0, index).source for index in range(BLOCK)) == {0: 500, 1: 500}


def test_a_source_with_a_share_must_keep_an_image(folders) -> None:
    for bad in folders[1].iterdir():
        bad.write_bytes(bad.read_bytes()[:300])
    data = opened(folders, 0.5, 0.5, max_unreadable=0.5)
    with pytest.raises(UserError, match=r"source 1 of data\.train has a share, but no image that can be read"):
        data.check()
