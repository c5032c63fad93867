"""`rewardsr data check`: every fault is counted, and what a run would refuse has exit code 2."""

import json
from pathlib import Path

import pytest
import torch

from rewardsr import progress
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data
from rewardsr.data.images import read_image, write_image
from rewardsr.data.survey import survey
from rewardsr.errors import UserError
from rewardsr.train.recipe import SourceRecipe


def write(path: Path, height: int, width: int, seed: int) -> None:
    write_image(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)), path)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Of eight images: one too small, two unreadable, one twice there; texts of some."""
    folder = tmp_path / "mixed"
    for number, size in enumerate([(40, 50), (20, 60), (64, 64), (33, 80), (36, 32)]):
        write(folder / f"{number}.png", *size, number)
    (folder / "sub").mkdir()
    write_image(read_image(folder / "2.png"), folder / "sub" / "copy.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "3.png").read_bytes()[:4000])
    (folder / "0.txt").write_text("a text")
    (folder / "1.txt").write_text(" ")
    return folder


def test_everything_is_counted(mixed) -> None:
    found = survey(SourceRecipe(path=str(mixed)), crop=32)
    assert (found.kind, found.images, found.usable) == ("HQ images", 8, 5)
    assert found.too_small == ["1.png (20x60)"] and found.sizes == ["36x32", "64x64", "33x80"]
    assert len(found.unreadable) == 2 and "bad.jpg" in found.unreadable[0] and "cut.png" in found.unreadable[1]
    assert found.duplicates == [["2.png", "copy.png"]]
    assert (found.captions, found.empty_caption) == ("sidecar", ["1.png"])
    assert found.no_caption == ["2.png", "3.png", "4.png", "bad.jpg", "cut.png", "copy.png"]
    assert found.problems == ["2 images are unreadable"]
    assert not survey(SourceRecipe(path=str(mixed)), crop=32, max_unreadable=0.25).problems


def test_it_tells_how_far_it_has_come(mixed, capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SELDOM", 0)
    survey(SourceRecipe(path=str(mixed)), crop=32)
    told = [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()]
    assert told == [*(f"reading headers {n}/8" for n in range(1, 9)), *(f"images {n}/6" for n in range(1, 7))]


def test_a_run_uses_what_is_called_usable(mixed) -> None:
    found = survey(SourceRecipe(path=str(mixed)), crop=32, max_unreadable=0.25)
    data = open_data(mixed, scale=4, crop=32, degradation=Light(LightOptions(), 4), max_unreadable=0.25)
    data.check()
    assert len(data) == found.usable


def test_pairs(tmp_path) -> None:
    for number in range(4):
        write(tmp_path / "gt" / f"{number}.png", 32, 40, number)
        write(tmp_path / "lq" / f"{number}.png", 8, 10, number)
    found = survey(SourceRecipe(path=str(tmp_path)), crop=16)
    assert (found.kind, found.usable, found.problems) == ("pairs", 4, [])
    (tmp_path / "lq" / "0.png").rename(tmp_path / "lq" / "x.png")
    write(tmp_path / "lq" / "1.png", 8, 11, 1)
    (tmp_path / "lq" / "2.png").write_bytes(b"")
    found = survey(SourceRecipe(path=str(tmp_path)), crop=16)
    assert (found.images, found.usable, found.no_partner) == (3, 1, ["gt/0.png", "lq/x.png"])
    assert found.unfitting == ["1.png is 32x40 for an LQ image of 8x11"]
    assert found.problems == ["2 images have no partner", "1 pairs do not fit scale 4", "1 images are unreadable"]


def test_texts_that_are_asked_for_must_be_there(mixed) -> None:
    asked = survey(SourceRecipe(path=str(mixed)), crop=32, prompts="sidecar", max_unreadable=0.25)
    assert asked.problems == ["6 images have no caption"]
    none = survey(SourceRecipe(path=str(mixed)), crop=32, prompts="metadata", max_unreadable=0.25)
    assert none.captions == "none" and none.problems == ["8 images have no caption"]
    with pytest.raises(UserError, match="expected sidecar or metadata"):
        survey(SourceRecipe(path=str(mixed)), prompts="captioner")


def test_the_command(mixed, commands, tmp_path) -> None:
    answer = commands("data", "check", mixed, "--crop", 32)
    assert answer.code == 2 and answer.err == f"error: '{mixed}' cannot be used: 2 images are unreadable\n"
    lines = answer.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("images", "sizes", "too small", "unreadable", "duplicates", "captions", "usable"),
    ]
    assert lines[0].split()[1:4] == ["8", "HQ", "images"] and "1  1.png (20x60)" in lines[2]
    assert "1  2.png = copy.png" in lines[4] and "6 missing (2.png, 3.png, 4.png, ...); 1 empty (1.png)" in lines[5]
    answer = commands("data", "check", mixed, "--crop", 32, "--max-unreadable", 0.3, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert (found["images"], found["usable"], found["problems"]) == (8, 5, [])
    listed = tmp_path / "list.txt"
    listed.write_text("mixed/0.png\nmixed/4.png\n")
    assert commands("data", "check", listed, "--crop", 32).code == 0
    answer = commands("data", "check", listed, "--crop", 512)
    assert answer.code == 2 and answer.err.endswith("cannot be used: no image is usable for the crop of 512\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{folder}/nowhere",), "no data folder"),
        (("{folder}", "--layout", "pair"), "'layout' is 'pair': input should be"),
        (("{folder}", "--layout", "pairs"), "holds no such folders: pairs are one of"),
        (("{folder}", "--prompts", "some"), "expected sidecar or metadata"),
        (("{folder}/list.txt",), "1 of 1 files in the list"),
    ],
)
def test_what_cannot_be_looked_at(arguments, message, refused, tmp_path) -> None:
    write(tmp_path / "0.png", 8, 8, 0)
    (tmp_path / "list.txt").write_text("1.png")
    assert message in refused("data", "check", *(text.format(folder=tmp_path) for text in arguments))
