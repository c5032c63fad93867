"""Images stand upright wherever their orientation is written, and their size is known without decoding them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from _files import XMP, chunk, exif_of, marks, png, saved, upright
from PIL import Image, features

from rewardsr.data.images import from_pil, image_size, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
RGB8 = 8, 2


def assert_upright(path: Path, content: bytes, turned: bool) -> None:
    path.write_bytes(content)
    expected = torch.from_numpy(upright(content)).permute(2, 0, 1).float() / 255
    if expected.shape[-2:] != ((9, 6) if turned else (6, 9)):
        pytest.skip("this PIL does not find the orientation there")
    assert torch.equal(read_image(path), expected)
    assert torch.equal(from_pil(Image.open(io.BytesIO(content))), expected)
    assert image_size(path) == tuple(expected.shape[-2:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", ["front", "behind"])
@pytest.mark.parametrize("mark", ["exif", "xmp", "raw"])
def test_png(tmp_path, mark, place, orientation) -> None:
    content = png(PIXELS, *RGB8, **{place: marks(orientation)[mark]})
    assert_upright(tmp_path / "a.png", content, orientation > 4)


@pytest.mark.parametrize("mark", ["exif", "xmp", "raw"])
def test_png_with_one_orientation_in_front_and_another_behind(tmp_path, mark) -> None:
    for front, behind in ((6, 1), (1, 6), (6, 3)):
        content = png(PIXELS, *RGB8, marks(front)["exif"], marks(behind)[mark])
        (tmp_path / "a.png").write_bytes(content)
        expected = torch.from_numpy(upright(content)).permute(2, 0, 1).float() / 255
        assert torch.equal(read_image(tmp_path / "a.png"), expected)
        assert image_size(tmp_path / "a.png") == tuple(expected.shape[-2:])


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("behind", [False, True])
def test_16_bit_png(tmp_path, behind, orientation) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (4, 5, 3))
    extra = marks(orientation)["exif"]
    (tmp_path / "a.png").write_bytes(png(levels, 16, 2, *((b"", extra) if behind else (extra, b""))))
    expected = np.rot90(levels, {1: 0, 3: 2, 6: -1}[orientation])
    image = read_image(tmp_path / "a.png")
    assert torch.equal((image * 65535).round().permute(1, 2, 0), torch.from_numpy(expected.astype(np.float32)))
    assert image_size(tmp_path / "a.png") == expected.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("MPO", {}),
        ("AVIF", {}),
        ("PNG", {}),
    ],
)
def test_exif(tmp_path, kind, options, orientation) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this PIL has no {kind}")
    content = saved(kind, PIXELS, exif=exif_of(orientation), **options)
    assert_upright(tmp_path / "a.bin", content, orientation > 4)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_xmp_alone(tmp_path, kind) -> None:
    tags = Image.Exif()
    tags[700] = XMP % 8
    content = saved(kind, PIXELS, **({"exif": tags.tobytes()} if kind == "TIFF" else {"xmp": XMP % 8}))
    assert_upright(tmp_path / "a.bin", content, True)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_uncompressed_tiff_that_pil_would_map_into_memory(tmp_path, mode) -> None:
    levels = np.arange(6 * 9, dtype=np.uint16).reshape(6, 9) * 1000
    image = Image.fromarray(levels) if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
    expected = from_pil(image).transpose(-1, -2).flip(-1)
    image.save(tmp_path / "a.tif", exif=exif_of(6))
    assert torch.equal(read_image(tmp_path / "a.tif"), expected)
    assert image_size(tmp_path / "a.tif") == (9, 6)


def test_the_size_of_plain_files_is_read_without_decoding_them(tmp_path, monkeypatch) -> None:
    text = chunk(b"tEXt", b"Software\0something") + chunk(b"tIME", bytes(7))
    files = [
        png(PIXELS, *RGB8, text, text),
        png(PIXELS, *RGB8, marks(1)["exif"]),
        saved("JPEG", PIXELS, exif=exif_of(1)),
        saved("TIFF", PIXELS),
    ]
    turned = [png(PIXELS, *RGB8, marks(6)["exif"]), saved("JPEG", PIXELS, exif=exif_of(6))]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for size, contents in (((6, 9), files), ((9, 6), turned)):
        for content in contents:
            (tmp_path / "a.bin").write_bytes(content)
            assert image_size(tmp_path / "a.bin") == size
