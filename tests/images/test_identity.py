"""What identifies the data of a run: the images themselves, wherever they lie."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data
from rewardsr.data.images import write_image
from rewardsr.errors import UserError

LIGHT = Light(LightOptions(), 4)


def write(path: Path, seed: int, side: int = 16) -> None:
    write_image(torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)), path)


@pytest.fixture(params=["hq", "pairs"])
def folder(request, tmp_path) -> Path:
    root = tmp_path / "data"
    for number in range(3):
        write(root / f"{number}.png" if request.param == "hq" else root / "gt" / f"{number}.png", number)
        if request.param == "pairs":
            write(root / "lq" / f"{number}.png", number + 10, 4)
        (root / "prompts").mkdir(exist_ok=True)
        (root / "extras").mkdir(exist_ok=True)
        (root / "prompts" / f"{number}.txt").write_text(f"image {number}")
        save_file({"a": torch.full((2,), float(number))}, root / "extras" / f"{number}.safetensors")
    return root


def identity(folder: Path, **options: object) -> str:
    known = {"scale": 4, "degradation": LIGHT, "prompts": "sidecar", "extras": ["a"]}
    return open_data(folder, **(known | options)).identity()


def test_a_copy_elsewhere_is_the_same_data(folder, tmp_path, monkeypatch) -> None:
    first = identity(folder)
    assert 8 <= len(first) <= 64 and first == identity(folder)
    copy = tmp_path / "somewhere" / "else"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    (copy / "notes.md").write_text("no part of the data")
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert identity(copy) == identity(Path("else")) == identity(Path("~/else")) == first


def hq_of(folder: Path) -> Path:
    return folder / "gt" if (folder / "gt").is_dir() else folder


def added(folder: Path) -> None:
    for path in folder.rglob("1.*"):
        shutil.copy(path, path.with_stem("3"))


def removed(folder: Path) -> None:
    for path in folder.rglob("1.*"):
        path.unlink()


def renamed(folder: Path) -> None:
    for path in folder.rglob("2.*"):
        path.rename(path.with_stem("3"))


def swapped(folder: Path) -> None:
    one, two = hq_of(folder) / "0.png", hq_of(folder) / "1.png"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def repainted(folder: Path) -> None:
    write(hq_of(folder) / "0.png", 99)


def retold(folder: Path) -> None:
    (folder / "prompts" / "0.txt").write_text("image 1")


def other_tensors(folder: Path) -> None:
    save_file({"a": torch.full((2,), 7.0)}, folder / "extras" / "0.safetensors")


@pytest.mark.parametrize("change", [added, removed, renamed, swapped, repainted, retold, other_tensors])
def test_any_change_is_seen(folder, change) -> None:
    before = identity(folder)
    change(folder)
    assert identity(folder) != before


def test_what_the_run_does_not_use_does_not_count(folder) -> None:
    before = identity(folder, prompts="adapter", extras=[])
    retold(folder)
    other_tensors(folder)
    assert identity(folder, prompts="adapter", extras=[]) == before
    assert identity(folder, prompts="a photo", extras=[]) != before


def test_a_partner_counts(tmp_path) -> None:
    for number in range(2):
        write(tmp_path / "gt" / f"{number}.png", number)
        write(tmp_path / "lq" / f"{number}.png", number, 4)
    before = open_data(tmp_path, scale=4).identity()
    (tmp_path / "lq").rename(tmp_path / "lr")
    assert open_data(tmp_path, scale=4).identity() == before
    write(tmp_path / "lr" / "1.png", 9, 4)
    assert open_data(tmp_path, scale=4).identity() != before


@pytest.mark.parametrize("place", [0, 500_000, -1])
def test_of_large_files_samples_are_compared(tmp_path, place) -> None:
    """Files of one size that differ all over, and at their ends."""
    from rewardsr.data.identity import identity_of

    content = bytearray(1_000_001)
    paths = [tmp_path / name / "a.bmp" for name in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(content)
    assert identity_of(paths[:1]) == identity_of(paths[1:])
    if place == 500_000:  # replaced by another picture
        content[100_000:] = os.urandom(900_001)
    else:
        content[place] ^= 1
    paths[1].write_bytes(content)
    assert identity_of(paths[:1]) != identity_of(paths[1:])
    paths[0].unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.bmp"):
        identity_of(paths)
