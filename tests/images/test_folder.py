"""Image folders to batches: checks, layouts, and samples that depend on seed and index only."""

from pathlib import Path

import pytest
import torch

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.images import read_image, read_pixels, write_image
from rewardsr.errors import UserError
from rewardsr.train.recipe import SourceRecipe

LIGHT = Light(LightOptions(), 4)


def make_images(folder: Path, sizes: list[tuple[int, int]], start: int = 0) -> list[torch.Tensor]:
    """Random images 000.png, 001.png, ... of these sizes."""
    result = []
    for number, size in enumerate(sizes, start):
        image = torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(number)).float() / 255
        write_image(image, folder / f"{number:03}.png")
        result.append(image)
    return result


@pytest.fixture
def hq_folder(tmp_path) -> Path:
    make_images(tmp_path / "hq_only", [(40, 52), (33, 47), (64, 32), (32, 32), (50, 50)])
    return tmp_path / "hq_only"


@pytest.fixture
def pairs(tmp_path) -> Path:
    make_images(tmp_path / "pairs" / "lq", [(10, 13), (16, 8), (8, 8)])
    for path in (tmp_path / "pairs" / "lq").iterdir():
        enlarged = read_image(path).repeat_interleave(4, 1).repeat_interleave(4, 2)
        write_image(enlarged, tmp_path / "pairs" / "gt" / path.name)
    return tmp_path / "pairs"


def open_hq(folder: Path, **options) -> Data:
    return open_data(folder, **{"scale": 4, "crop": 32, "degradation": LIGHT, **options})


def same(one, other) -> bool:
    return (
        torch.equal(one.lq, other.lq)
        and torch.equal(one.hq, other.hq)
        and one.paths == other.paths
        and one.prompts == other.prompts
    )


# ---- what a batch is ----


def test_batch_of_an_hq_folder(hq_folder) -> None:
    batch = open_hq(hq_folder).batch(0, range(3))
    assert batch.hq.shape == (3, 3, 32, 32) and batch.lq.shape == (3, 3, 8, 8)
    for image in (batch.lq, batch.hq):
        assert image.dtype == torch.float32 and float(image.min()) >= 0 and float(image.max()) <= 1
    assert batch.prompts is None
    assert all(Path(path).parent == hq_folder for path in batch.paths)


def test_crops_are_parts_of_the_files(hq_folder) -> None:
    data = open_hq(hq_folder, flips=False)
    batch = data.batch(3, range(20))
    for crop, path in zip(batch.hq, batch.paths, strict=True):
        windows = read_image(path).unfold(1, 32, 1).unfold(2, 32, 1)  # (3, rows, columns, 32, 32)
        assert bool((windows == crop[:, None, None]).all((0, 3, 4)).any())


def test_pairs_stay_aligned(pairs) -> None:
    """The target of these pairs is LQ with every pixel repeated: true of every crop and flip."""
    batch = open_data(pairs, scale=4, crop=16).batch(1, range(30))
    assert torch.equal(batch.lq.repeat_interleave(4, 2).repeat_interleave(4, 3), batch.hq)
    assert batch.lq.shape == (30, 3, 4, 4)


def test_pairs_ignore_the_degradation(pairs) -> None:
    plain, given = (open_data(pairs, scale=4, crop=16, degradation=light) for light in (None, LIGHT))
    assert same(plain.batch(0, range(4)), given.batch(0, range(4)))


def test_flips_mirror_and_change_nothing_else(hq_folder) -> None:
    plain, flipped = (open_hq(hq_folder, flips=flips).batch(0, range(20)).hq for flips in (False, True))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(mirrored) < 20
    for a, b, mirror in zip(plain, flipped, mirrored, strict=True):
        assert torch.equal(a.flip(-1) if mirror else a, b)


def test_scale_1(tmp_path) -> None:
    make_images(tmp_path, [(20, 20)])
    batch = open_data(tmp_path, scale=1, crop=10, degradation=Light(LightOptions(), 1)).batch(0, [0])
    assert batch.lq.shape == batch.hq.shape == (1, 3, 10, 10)


def test_16_bit_files_are_not_rounded(tmp_path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "a.png")
    data = open_data(tmp_path, scale=4, crop=8, degradation=LIGHT)
    for _ in range(2):
        assert torch.equal(data.batch(0, [0]).hq, torch.full((1, 3, 8, 8), 1000 / 65535))


# ---- no state ----


def test_a_sample_does_not_depend_on_its_batch(hq_folder) -> None:
    whole = open_hq(hq_folder).batch(7, range(12))
    for size in (1, 3, 4):
        data = open_hq(hq_folder, cache_mb=0)
        for start in reversed(range(0, 12, size)):  # another order, another process
            part = data.batch(7, range(start, start + size))
            assert torch.equal(part.lq, whole.lq[start : start + size])
            assert torch.equal(part.hq, whole.hq[start : start + size])
            assert part.paths == whole.paths[start : start + size]


def test_two_processes_make_one_batch(hq_folder) -> None:
    whole = open_hq(hq_folder).batch(0, range(8, 16))
    even, odd = (open_hq(hq_folder).batch(0, range(8 + rank, 16, 2)) for rank in range(2))
    assert torch.equal(torch.stack([even.lq, odd.lq], 1).flatten(0, 1), whole.lq)


def test_global_random_state_is_neither_used_nor_changed(hq_folder) -> None:
    data = open_hq(hq_folder)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = data.batch(0, range(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, data.batch(0, range(4)))


def test_every_epoch_shows_every_image_once(hq_folder) -> None:
    data = open_hq(hq_folder)
    epochs = [[data.item(0, index).hq for index in range(5 * epoch, 5 * epoch + 5)] for epoch in range(8)]
    assert all(sorted(epoch) == [item.hq for item in data.items] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [data.item(1, index).hq for index in range(40)] != [path for epoch in epochs for path in epoch]
    assert data.batch(0, range(40)).paths == tuple(str(path) for epoch in epochs for path in epoch)


def test_seed_and_index_matter(tmp_path) -> None:
    make_images(tmp_path, [(64, 64)])
    data = open_hq(tmp_path)
    crops = torch.cat([data.batch(0, range(6)).hq, data.batch(1, range(6)).hq])
    assert len({crop.numpy().tobytes() for crop in crops}) == 12


def test_cache(hq_folder, monkeypatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr("rewardsr.data.loader.read_pixels", lambda path: (reads.append(path), read_pixels(path))[1])
    data = open_hq(hq_folder)
    first = data.batch(0, range(10))
    assert len(reads) == 5
    assert same(first, data.batch(0, range(10)))
    first.hq.zero_()  # a caller may do with a batch what it likes
    assert float(data.batch(0, range(10)).hq.mean()) > 0.4 and len(reads) == 5
    open_hq(hq_folder, cache_mb=0).batch(0, range(10))
    assert len(reads) == 15


# ---- validation ----


def test_validation_of_an_hq_folder(hq_folder) -> None:
    data = open_hq(hq_folder)
    batches = list(data.validation())
    assert [Path(batch.paths[0]).name for batch in batches] == [f"00{number}.png" for number in range(5)]
    assert [tuple(batch.hq.shape) for batch in batches[:2]] == [(1, 3, 40, 52), (1, 3, 32, 44)]
    assert tuple(batches[1].lq.shape) == (1, 3, 8, 11)
    assert torch.equal(batches[1].hq[0], read_image(hq_folder / "001.png")[:, :32, 1:45])
    assert all(same(a, b) for a, b in zip(batches, open_hq(hq_folder).validation(), strict=True))
    other = next(iter(data.validation(seed=1)))
    assert torch.equal(other.hq, batches[0].hq) and not torch.equal(other.lq, batches[0].lq)


def test_validation_limit_and_side(hq_folder) -> None:
    data = open_hq(hq_folder)
    batches = list(data.validation(limit=2, side=18))
    assert [tuple(batch.hq.shape) for batch in batches] == [(1, 3, 16, 16)] * 2
    assert torch.equal(batches[0].hq[0], read_image(hq_folder / "000.png")[:, 12:28, 18:34])
    with pytest.raises(UserError, match="validation_side is 3"):
        next(data.validation(side=3))


def test_validation_of_pairs(pairs) -> None:
    data = open_data(pairs, scale=4)
    whole = next(data.validation())
    assert torch.equal(whole.lq[0], read_image(pairs / "lq" / "000.png"))
    assert torch.equal(whole.hq[0], read_image(pairs / "gt" / "000.png"))
    for part in data.validation(side=20):
        assert torch.equal(part.lq.repeat_interleave(4, 2).repeat_interleave(4, 3), part.hq)
        assert part.hq.shape[-2:] == (20, 20)


def test_without_crop_there_is_no_training(pairs) -> None:
    with pytest.raises(ValueError, match="crop"):
        open_data(pairs, scale=4).batch(0, [0])
    with pytest.raises(ValueError, match="at least one index"):
        open_data(pairs, scale=4, crop=4).batch(0, [])


# ---- prompts ----


def test_prompts(hq_folder) -> None:
    assert open_hq(hq_folder, prompts="a photo").batch(0, [0, 1]).prompts == ("a photo", "a photo")
    with pytest.raises(UserError, match="5 of 5 images have no prompt file"):
        open_hq(hq_folder, prompts="sidecar")
    (hq_folder / "prompts").mkdir()
    for number in range(5):
        (hq_folder / "prompts" / f"00{number}.txt").write_text(f"image {number}")
    data = open_hq(hq_folder, prompts="sidecar")
    batch = data.batch(0, range(5))
    assert batch.prompts == tuple(f"image {int(Path(path).stem)}" for path in batch.paths)
    assert [batch.prompts for batch in data.validation(limit=2)] == [("image 0",), ("image 1",)]


# ---- what is refused ----


def test_missing_and_empty_folders(tmp_path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        open_hq(tmp_path / "missing")
    with pytest.raises(UserError, match="no images in"):
        open_hq(tmp_path)
    (tmp_path / "lq").mkdir()
    (tmp_path / "gt").mkdir()
    with pytest.raises(UserError, match=r"no images in .*gt"):
        open_hq(tmp_path)
    with pytest.raises(UserError, match="it is a file"):
        open_hq(Path(__file__))


def test_half_of_the_pairs_or_too_many(tmp_path) -> None:
    (tmp_path / "lq").mkdir()
    with pytest.raises(UserError, match="holds lq: pairs are one of"):
        open_data([SourceRecipe(path=str(tmp_path), layout="pairs")], scale=4)
    (tmp_path / "gt").mkdir()
    (tmp_path / "hq").mkdir()
    with pytest.raises(UserError, match="holds lq, gt, hq"):
        open_data(tmp_path, scale=4)


def test_lr_and_hq_are_names_of_pairs_too(pairs) -> None:
    (pairs / "lq").rename(pairs / "lr")
    (pairs / "gt").rename(pairs / "hq")
    assert len(open_data(pairs, scale=4, crop=16)) == 3


def test_unmatched_names(pairs) -> None:
    (pairs / "lq" / "000.png").rename(pairs / "lq" / "000x4.png")
    with pytest.raises(UserError, match=r"2 images .* no partner of the same name: gt/000\.png, lq/000x4\.png"):
        open_data(pairs, scale=4)


def test_pairs_match_across_extensions_but_not_twice(pairs) -> None:
    (pairs / "lq" / "000.png").rename(pairs / "lq" / "000.PNG")
    assert len(open_data(pairs, scale=4)) == 3
    write_image(torch.zeros(3, 10, 13), pairs / "lq" / "001.png")
    (pairs / "lq" / "001.png").rename(pairs / "lq" / "000.jpg")
    with pytest.raises(UserError, match="several images of one name"):
        open_data(pairs, scale=4)


def test_sizes_of_pairs(pairs) -> None:
    with pytest.raises(
        UserError, match=r"3 of 3 pairs do not fit scale 2 .*000\.png is 40x52 for an LQ image of 10x13"
    ):
        open_data(pairs, scale=2)


def test_images_smaller_than_the_crop_are_left_out_and_counted(hq_folder, caplog) -> None:
    data = open_hq(hq_folder, crop=36)
    assert [item.hq.name for item in data.items] == ["000.png", "004.png"]
    (said,) = caplog.messages
    assert said == (
        f"'{hq_folder}': 3 of 5 images are smaller than the crop of 36 and are left out: 001.png (33x47), "
        "002.png (64x32), 003.png (32x32)"
    )
    assert {Path(path).name for path in data.batch(0, range(8)).paths} == {"000.png", "004.png"}
    make_images(hq_folder, [(3, 9)], start=5)
    assert len(open_hq(hq_folder, crop=None)) == 5
    with pytest.raises(UserError, match=r"no image in .* is as large as the crop of 64: 000\.png \(40x52\).* pad"):
        open_hq(hq_folder, crop=64)


@pytest.mark.parametrize("crop", [0, -4, 2, 30])
def test_crop_must_fit_the_scale(hq_folder, crop) -> None:
    with pytest.raises(UserError, match="positive multiple of the scale 4"):
        open_hq(hq_folder, crop=crop)


def test_degradation_must_be_there_and_fit(hq_folder) -> None:
    with pytest.raises(UserError, match="set a degradation"):
        open_hq(hq_folder, degradation=None)
    with pytest.raises(UserError, match=r"made \(3, 16, 16\) of \(3, 32, 32\), expected \(3, 8, 8\)"):
        open_hq(hq_folder, degradation=Light(LightOptions(), 2)).batch(0, [0])


def test_bad_headers_are_found_on_opening(hq_folder) -> None:
    (hq_folder / "002.png").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"002\.png': not an image"):
        open_hq(hq_folder)


def test_truncation_is_found_by_check(hq_folder) -> None:
    open_hq(hq_folder).check()
    for name in ("001.png", "003.png"):
        content = (hq_folder / name).read_bytes()
        (hq_folder / name).write_bytes(content[: len(content) // 2])
    data = open_hq(hq_folder)
    with pytest.raises(
        UserError, match=r"2 of 5 images are unreadable, and data.max_unreadable allows 0.*001\.png.*003\.png"
    ):
        data.check()
