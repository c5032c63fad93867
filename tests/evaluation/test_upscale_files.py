"""What of an input file its result keeps, in all formats, and several processes on one folder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from rewardsr import load_adapter
from rewardsr.data.images import read_image, write_image
from rewardsr.data.writing import encode, read_picture
from rewardsr.errors import UserError
from rewardsr.evaluation.record import FILE, Record
from rewardsr.evaluation.upscale import upscale

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def adapter(tiny_base):
    return load_adapter("osediff", tiny_base, scale=4)


def photo(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    """A file with a profile, EXIF that turns it, and 300 dpi."""
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif[0x8769], exif[0x8825] = {0x9003: "2020:01:01 00:00:00", 0xA002: size[0]}, {1: "N"}
    pixels = generator.integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, icc_profile=PROFILE, exif=exif, dpi=(300, 300))
    return path


@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "tiff"])
def test_profile_exif_and_size_on_paper_are_kept(adapter, tmp_path, name) -> None:
    source = photo(tmp_path / "a.png")
    (made,) = upscale(adapter, source, tmp_path / "out", format=name)
    assert made.suffix == {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}[name]
    with Image.open(made) as image:
        assert image.format == name.upper() and image.size == (24, 32), "upright, four times as large"
        exif = image.getexif()
        folders = {tag: exif.get_ifd(tag) for tag in (0x8769, 0x8825)}
        image.load()
        assert image.info["icc_profile"] == PROFILE
        assert 0x0112 not in exif and exif[0x010F] == "Maker"
        assert folders[0x8769][0x9003] == "2020:01:01 00:00:00" and folders[0x8769][0xA002] == 24
        assert folders[0x8825][1] == "N"
        assert float(exif[0x011A]) == pytest.approx(1200, abs=1), "four times the pixels on as much paper"
    plain = torch.from_numpy(np.array(upscale(adapter, source)[0])).permute(2, 0, 1)
    difference = (read_image(made) * 255 - plain).abs()
    assert float(difference.mean()) <= {"jpeg": 15, "webp": 30}.get(name, 1e-3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_are_kept(adapter, tmp_path, suffix, channels, caplog) -> None:
    cv2 = pytest.importorskip("cv2")
    deep = np.random.default_rng(0).integers(1, 65536, (6, 8, channels), np.uint16)
    source = tmp_path / f"in{suffix}"
    assert cv2.imwrite(str(source), deep)
    picture = read_picture(source)
    rgb = torch.from_numpy(deep[..., 2::-1].astype(np.float32)).permute(2, 0, 1)
    assert picture.deep and torch.equal((picture.colours * 65535).round(), rgb)
    for name in ("png", "tiff"):
        again = tmp_path / name
        again.write_bytes(encode(picture.colours, picture, 1, name))
        found = read_picture(again)
        assert found.deep and torch.allclose(found.colours, picture.colours, atol=1e-6)
        assert (found.alpha is None) == (channels == 3)
        if found.alpha is not None:
            assert torch.allclose(found.alpha, picture.alpha, atol=1e-4)
    (made,) = upscale(adapter, source, tmp_path / "out", format="tiff")
    assert cv2.imread(str(made), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    upscale(adapter, source, tmp_path / "small.jpg")
    assert any("jpeg does not hold 16 bits (8 are written) of 1 images" in line for line in caplog.messages)


def test_transparency_is_enlarged_beside_the_colours(adapter, tmp_path, caplog) -> None:
    pixels = np.full((8, 8, 4), (200, 40, 40, 255), np.uint8)
    pixels[:, 4:] = 0, 255, 0, 0  # a green that nobody sees
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert torch.equal(picture.colours[:, :, 4:], picture.colours[:, :, :4]), "the hidden green does not bleed"
    (file,), (picture,) = (upscale(adapter, tmp_path / "a.png", folder) for folder in (tmp_path / "out", None))
    for made in (Image.open(file), picture):
        assert made.mode == "RGBA"
        alpha = np.array(made)[..., 3]
        assert (alpha[:, :12] == 255).all() and (alpha[:, 20:] == 0).all() and alpha.shape == (32, 32)
    (white,) = upscale(adapter, tmp_path / "a.png", tmp_path / "a.jpg")
    assert np.array(Image.open(white))[:, 24:].min() > 240 and "transparency" in caplog.text


def test_one_image_may_become_a_file(adapter, tmp_path) -> None:
    source = photo(tmp_path / "in" / "a.png")
    assert upscale(adapter, source, tmp_path / "made.webp", quality=100) == [tmp_path / "made.webp"]
    photo(tmp_path / "in" / "b.png")
    for call, message in (
        (lambda: upscale(adapter, tmp_path / "in", tmp_path / "b.jpg"), "is one file, and there are 2 images"),
        (lambda: upscale(adapter, source, tmp_path / "b.jpg", format="png"), "ends as a jpeg file"),
        (lambda: upscale(adapter, source, tmp_path / "out", format="gif"), "unknown format 'gif'"),
        (lambda: upscale(adapter, source, tmp_path / "out", quality=0), "quality is 0"),
        (lambda: upscale(adapter, source, tmp_path / "out", overwrite=True, skip_existing=True), "choose one"),
        (lambda: upscale(adapter, torch.zeros(3, 1, 4200), tmp_path / "b.webp"), "webp holds 16383 a side"),
        (lambda: upscale(adapter, source, source), "is an input"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "in", "made.webp"]


def test_what_is_there_may_be_skipped_unseen(adapter, tmp_path) -> None:
    for name in ("a", "b"):
        write_image(torch.rand(3, 6, 8), tmp_path / "in" / f"{name}.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"1 of the results already \(a\.png\).*--skip-existing"):
        upscale(adapter, tmp_path / "in", tmp_path / "out")
    upscale(adapter, tmp_path / "in", tmp_path / "out", skip_existing=True)
    assert (tmp_path / "out" / "a.png").read_bytes() == b"somebody's"
    assert read_image(tmp_path / "out" / "b.png").shape == (3, 24, 32)


def test_a_claim_is_one_process_s_own(adapter, tmp_path) -> None:
    first, second = Record(tmp_path, adapter), Record(tmp_path, adapter)
    with first.claimed(tmp_path / "a.png", wait=False) as mine:
        assert mine
        with (
            second.claimed(tmp_path / "a.png", wait=False) as theirs,
            second.claimed(tmp_path / "b.png", False) as other,
        ):
            assert not theirs and other
            held = sorted(tmp_path.iterdir())
            Record(tmp_path, adapter).remove_claims()
            assert sorted(tmp_path.iterdir()) == held and len(held) == 2
    with second.claimed(tmp_path / "a.png", wait=False) as mine:
        assert mine and list(tmp_path.glob("*.png")) == []


def test_two_processes_share_a_folder(tiny_base, adapter, tmp_path) -> None:
    for number in range(6):
        picture = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(number))
        write_image(picture, tmp_path / "in" / f"{number}.png")
    command = [sys.executable, "-m", "rewardsr", "upscale", str(tmp_path / "in"), "--base", str(tiny_base)]
    command += ["--device", "cpu", "-o", str(tmp_path / "out")]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=one, **piped) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [line.split()[-1] for out, _ in said for line in out.splitlines() if "/6 " in line]
    assert sorted(made) == [str(tmp_path / "out" / f"{number}.png") for number in range(6)], "each once"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FILE, *(f"{n}.png" for n in range(6))]
    alone = upscale(load_adapter("osediff", tiny_base), tmp_path / "in", tmp_path / "alone")
    assert [path.read_bytes() for path in alone] == [(tmp_path / "out" / path.name).read_bytes() for path in alone]
