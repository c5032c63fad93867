"""Where images may lie: subfolders, lists, pairs of several names, LQ images alone; and what is left out of them."""

import os
from pathlib import Path

import pytest
import torch

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.images import read_image, write_image
from rewardsr.errors import UserError
from rewardsr.testing import write_images
from rewardsr.train.recipe import SourceRecipe

LIGHT = Light(LightOptions(), 4)


def opened(*sources: Path | dict, **options) -> Data:
    made = [SourceRecipe(**(entry if isinstance(entry, dict) else {"path": str(entry)})) for entry in sources]
    return open_data(made, **{"scale": 4, "crop": 16, "degradation": LIGHT, **options})


def names(data: Data) -> list[str]:
    return [item.shown.name for item in data.items]


def write(path: Path, height: int = 32, width: int = 32, seed: int = 0) -> Path:
    return write_image(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)), path)


def write_pair(root: Path, name: str, lq: str = "lq", hq: str = "gt", enlarge: int = 4, side: int = 8) -> None:
    """HQ is LQ with every pixel repeated."""
    image = torch.rand(3, side, side + 2, generator=torch.Generator().manual_seed(len(name)))
    write_image(image, root / lq / name)
    large = read_image(root / lq / name).repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    write_image(large, root / hq / name)


# ---- folders ----


def test_folders_inside_are_searched_in_an_order_of_their_own(tmp_path) -> None:
    for name in ("b.png", "a/z.png", "a/deep/y.png", "c/b.png", ".hidden/x.png"):
        write(tmp_path / name)
    (tmp_path / "c" / "up").symlink_to(tmp_path)  # a circle
    data = opened(tmp_path)
    assert [str(item.hq.relative_to(tmp_path)) for item in data.items] == [
        "a/deep/y.png",
        "a/z.png",
        "b.png",
        "c/b.png",
    ]
    assert data.said == f"4 HQ images in '{tmp_path}'"


def test_texts_of_folders_inside_lie_in_folders_of_the_same_names(tmp_path) -> None:
    for name in ("gt/a/1.png", "gt/b/1.png"):
        write(tmp_path / name)
        text = (tmp_path / name.replace("gt", "tag")).with_suffix(".txt")
        text.parent.mkdir(parents=True)
        text.write_text(f"of {name}")
    assert [item.prompt for item in opened(tmp_path, prompts="sidecar").items] == ["of gt/a/1.png", "of gt/b/1.png"]


def test_a_folder_called_gt_alone_holds_hq_images(tmp_path) -> None:
    write(tmp_path / "gt" / "1.png")
    assert opened(tmp_path).has_hq and opened(tmp_path).items[0].lq is None


def test_pairs_match_by_folder_and_name(tmp_path) -> None:
    for name in ("x/1.png", "y/1.png", "2.png"):
        write_pair(tmp_path, name)
    data = opened(tmp_path)
    assert data.said == f"3 pairs in '{tmp_path}'" and data.items[1].lq == tmp_path / "lq" / "x" / "1.png"
    batch = data.batch(0, range(6))
    assert torch.equal(batch.lq.repeat_interleave(4, 2).repeat_interleave(4, 3), batch.hq)
    (tmp_path / "lq" / "x" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1 images in .* have no partner of the same name: gt/x/1\.png"):
        opened(tmp_path)


def test_the_layout_of_seesr(tmp_path) -> None:
    """`sr_bicubic` is LQ at the size of HQ, so it fits scale 1; `lr`, beside it, is for scale 4."""
    write_pair(tmp_path, "1.png", "sr_bicubic", enlarge=1, side=32)
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "1.txt").write_text("a dog, grass")
    data = opened(tmp_path, scale=1, crop=16, prompts="sidecar", degradation=None)
    batch = data.batch(0, [0])
    assert torch.equal(batch.lq, batch.hq) and batch.prompts == ("a dog, grass",)
    with pytest.raises(UserError, match=r"enlarged to the size of HQ already, which fits scale 1, not 4"):
        opened(tmp_path)
    write_image(torch.rand(3, 8, 9), tmp_path / "lr" / "1.png")
    write_image(torch.rand(3, 32, 36), tmp_path / "gt" / "1.png")
    assert opened(tmp_path).items[0].lq == tmp_path / "lr" / "1.png"


def test_a_layout_can_be_said(tmp_path) -> None:
    write_pair(tmp_path, "1.png")
    assert opened({"path": str(tmp_path), "layout": "hq"}).items[0].lq is None
    assert not opened({"path": str(tmp_path), "layout": "lq"}).has_hq
    with pytest.raises(UserError, match="holds no such folders: pairs are one of"):
        opened({"path": str(tmp_path / "gt"), "layout": "pairs"})


# ---- LQ images alone ----


def test_lq_images_alone(tmp_path) -> None:
    write(tmp_path / "lq" / "1.png", 8, 10)
    data = opened(tmp_path, degradation=None)
    batch = data.batch(0, range(4))
    assert batch.hq is None and batch.lq.shape == (4, 3, 4, 4) and data.items[0].size == (32, 40)
    windows = read_image(tmp_path / "lq" / "1.png").unfold(1, 4, 1).unfold(2, 4, 1)
    for crop in batch.lq:
        assert any(
            torch.equal(crop, w) or torch.equal(crop.flip(-1), w) for row in windows.permute(1, 2, 0, 3, 4) for w in row
        )
    (whole,) = data.validation()
    assert whole.hq is None and torch.equal(whole.lq[0], read_image(tmp_path / "lq" / "1.png"))
    (part,) = data.validation(side=16)
    assert part.lq.shape == (1, 3, 4, 4)
    write(tmp_path / "hq_images" / "1.png")
    with pytest.raises(UserError, match="HQ images or tensors are there in some sources and not in others"):
        opened(tmp_path, tmp_path / "hq_images")


# ---- lists ----


def test_lists_of_paths(tmp_path) -> None:
    write(tmp_path / "data" / "a b.png")
    write(tmp_path / "elsewhere" / "c.png")
    (tmp_path / "data" / "a b.txt").write_text("a text")
    (tmp_path / "elsewhere" / "c.txt").write_text("another")
    listed = tmp_path / "data" / "list.txt"
    listed.write_text(f"\ufeffa b.png\r\n\n{tmp_path / 'elsewhere' / 'c.png'}\n../data/a b.png")
    data = opened(listed, prompts="sidecar")
    assert names(data) == ["a b.png", "c.png", "a b.png"]
    assert [item.prompt for item in data.items] == ["a text", "another", "a text"]
    assert data.batch(0, range(3)).lq.shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "1.png\nno.png\n\n/nor/this.png",
            r"2 of 3 files in the list .* are missing \(line 2: .*no\.png, line 4: /nor",
        ),
        ("\n \n", "is empty: a path of an image"),
        (b"\xff\xfe", "is not a text file"),
        ("1.png\n.", r"1 of 2 files in the list"),
        ("a\0b.png", "holds a character that no file name can hold"),
    ],
)
def test_lists_that_do_not_work(content, message, tmp_path) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "list.txt")


def test_a_list_of_pairs_is_refused_and_other_files_are_no_lists(tmp_path) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "list.txt").write_text("1.png")
    with pytest.raises(UserError, match="is a list of single images"):
        opened({"path": str(tmp_path / "list.txt"), "layout": "pairs"})
    with pytest.raises(UserError, match=r"it is a file, and a list of paths is called \.txt"):
        opened(tmp_path / "1.png")
    assert not opened({"path": str(tmp_path / "list.txt"), "layout": "lq"}, degradation=None).has_hq


# ---- what is left out ----


def test_padding_mirrors_at_the_edge_and_keeps_pairs_aligned(tmp_path) -> None:
    write_pair(tmp_path, "1.png", side=3)  # 12x20 pixels, LQ 3x5
    data = opened(tmp_path, crop=32, pad=True, flips=False, degradation=None)
    batch = data.batch(0, [0])
    assert batch.hq.shape == (1, 3, 32, 32)
    assert torch.equal(batch.lq.repeat_interleave(4, 2).repeat_interleave(4, 3), batch.hq)
    image = read_image(tmp_path / "gt" / "1.png")
    twice = torch.cat([image, image.flip(2)], 2)
    four = torch.cat([twice, twice.flip(1), twice], 1)
    assert torch.equal(batch.hq[0], four[:, :32, :32])
    (whole,) = data.validation()
    assert torch.equal(whole.hq[0], image)


def test_large_images_are_the_same_with_padding(tmp_path) -> None:
    write_images(tmp_path, 3, 48)
    plain, padded = (opened(tmp_path, pad=pad).batch(0, range(6)) for pad in (False, True))
    assert torch.equal(plain.lq, padded.lq) and torch.equal(plain.hq, padded.hq)


@pytest.fixture
def hundred(tmp_path) -> Path:
    """A hundred images, one of which is no image and another one truncated."""
    write(tmp_path / "all" / "000.png")
    for number in range(1, 100):
        os.link(tmp_path / "all" / "000.png", tmp_path / "all" / f"{number:03}.png")
    for number in (30, 60):
        (tmp_path / "all" / f"{number:03}.png").unlink()
    (tmp_path / "all" / "030.png").write_bytes(b"nothing of the kind")
    (tmp_path / "all" / "060.png").write_bytes((tmp_path / "all" / "000.png").read_bytes()[:300])
    return tmp_path / "all"


def test_unreadable_images_are_left_out_up_to_a_limit_and_said_once(hundred, caplog) -> None:
    data = opened(hundred, max_unreadable=0.02)
    data.check()
    assert len(data) == 98 and not {"030.png", "060.png"} & set(names(data))
    first, second = caplog.messages
    assert first.startswith("1 of 100 images are unreadable and are left out: cannot read") and "030.png" in first
    assert second.startswith("1 of 100 images are unreadable and are left out: cannot read") and "060.png" in second
    data.batch(0, range(98))
    assert len(caplog.messages) == 2
    with pytest.raises(UserError, match=r"1 of 100 images are unreadable, and data\.max_unreadable allows 0: "):
        opened(hundred, max_unreadable=0.009)
    with pytest.raises(UserError, match=r"1 of 100 images are unreadable, and data\.max_unreadable allows 0: .*060"):
        opened(hundred).check()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_turns_out_unreadable_is_replaced_for_its_sample_alone(hundred, workers, caplog) -> None:
    """Its place goes to another image, drawn for the sample: whatever the batch, the process, and what came before."""
    data = opened(hundred, max_unreadable=0.02, workers=workers)
    order = [data.item(0, index).shown.name for index in range(99)]
    bad = order.index("060.png")
    whole = data.batch(0, range(99))
    assert sum("060.png" in message for message in caplog.messages) == 1
    shown = [Path(path).name for path in whole.paths]
    assert [a for a, b in zip(order, shown, strict=True) if a != b] == ["060.png"]
    alone = opened(hundred, max_unreadable=0.02, workers=workers).batch(0, [bad])
    assert torch.equal(alone.lq[0], whole.lq[bad]) and alone.paths == whole.paths[bad : bad + 1]
    data.close()
    strict = opened(hundred, max_unreadable=0.01)
    with pytest.raises(UserError, match=r"060\.png.*; more are unreadable than data\.max_unreadable allows"):
        strict.batch(0, range(99))


def test_images_that_are_all_gone_or_small_end_the_run_whatever_is_allowed(tmp_path) -> None:
    write_images(tmp_path, 3, 48)
    data = opened(tmp_path, max_unreadable=1, cache_mb=0)
    for path in tmp_path.iterdir():
        write(path, 12, 12)
    with pytest.raises(UserError, match="was as large as the crop before and is not any more; more are unreadable"):
        data.batch(0, range(3))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="more are unreadable"):
        data.batch(1, range(3))
    with pytest.raises(UserError, match=r"3 of 3 images are unreadable, and data\.max_unreadable allows 2"):
        data.check()
    with pytest.raises(UserError, match="holds no image that can be read"):
        opened(tmp_path, max_unreadable=1)
