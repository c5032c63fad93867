"""Which files of a folder are its images, what is said of the others, and files that never end."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from _files import saved
from PIL import Image, features

from rewardsr.data import images
from rewardsr.data.images import list_images, read_image
from rewardsr.data.sidecars import resolve_prompts
from rewardsr.errors import UserError
from rewardsr.evaluation.pictures import grid
from rewardsr.testing import write_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_images(folder)]


def test_every_kind_that_pil_reads_counts(tmp_path) -> None:
    kinds = {"a.JFIF": "JPEG", "b.jpe": "JPEG", "c.gif": "GIF", "d.JP2": "JPEG2000", "e.ppm": "PPM", "f.TGA": "TGA"}
    if features.check("avif"):
        kinds["g.avif"] = "AVIF"
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(saved(kind, PIXELS))
    assert names(tmp_path) == list(kinds)
    assert all(read_image(path).shape == (3, 6, 9) for path in list_images(tmp_path))


@pytest.fixture
def mixed(tmp_path) -> Path:
    folder = write_images(tmp_path / "mixed", 2, 8)
    (folder / "b.heic").write_bytes(b"")
    (folder / "c.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "d.jpg")
    (folder / "e.NEF").write_bytes(b"")
    for quiet in (".hidden.png", "._000.png", "notes.txt", "000.safetensors", "archive.zip", "noext"):
        (folder / quiet).write_bytes(b"")
    (folder / "folder.png").mkdir()
    return folder


def test_what_looks_like_an_image_and_is_none_is_named_in_one_line(mixed, caplog) -> None:
    assert names(mixed) == ["000.png", "001.png"]
    (said,) = caplog.messages
    assert said == (
        f"'{mixed}': 4 look like images and are skipped: b.heic (this PIL does not read .heic), c.png (dead link), "
        "d.jpg (no regular file), ..."
    )
    for path in mixed.glob("00?.png"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no images in .*folders inside it .*\(folder\.png\); 4 look like images .*heic"
    ):
        list_images(mixed)


def test_a_folder_without_oddities_is_listed_without_a_word(tmp_path, caplog) -> None:
    write_images(tmp_path / "in", 2, 8)
    assert names(tmp_path / "in") == ["000.png", "001.png"] and not caplog.messages


def test_a_reader_that_somebody_registered_counts(tmp_path, monkeypatch) -> None:
    write_images(tmp_path, 1, 8)
    (tmp_path / "a.heic").write_bytes(saved("PNG", PIXELS))
    known = {**Image.registered_extensions(), ".heic": "PNG"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    images._extensions.cache_clear()
    try:
        assert names(tmp_path) == ["000.png", "a.heic"]
    finally:
        images._extensions.cache_clear()


def test_other_programs_are_never_called(tmp_path) -> None:
    """PIL hands EPS to Ghostscript, whatever a file is called."""
    (tmp_path / "a.png").write_bytes(saved("EPS", PIXELS))
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "loop"])
def test_files_that_never_end_are_not_opened(tmp_path, kind) -> None:
    for name in ("a.png", "a.txt"):
        path = tmp_path / name
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "zero" else path)
    with pytest.raises(UserError, match=r"no image file '.*a\.png'"):
        read_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="1 of 1 images have no prompt file"):
        resolve_prompts([tmp_path / "a.png"], "sidecar")


def test_a_text_of_a_gigabyte_is_no_prompt(tmp_path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**30)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"a\.txt' is longer than 100,000 bytes"):
        resolve_prompts([tmp_path / "a.png"], "sidecar")
    assert time.monotonic() - begun < 1
    (tmp_path / "a.txt").write_text("word " * 20_000)
    assert resolve_prompts([tmp_path / "a.png"], "sidecar") == [("word " * 20_000).strip()]


def test_names_of_any_kind_become_captions(tmp_path) -> None:
    image = read_image(write_images(tmp_path, 1, 8) / "000.png")
    for name in ("caf\udce9", "日本", "new\nline", "\x1b[31m"):
        assert grid([[(name, image)]]).shape == (3, 22, 8)
