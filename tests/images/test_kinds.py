"""Images of every depth and colour have the values that stand in their files; the files are made byte by byte."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import tifffile
import torch
from _files import chunk, declared, png, saved
from PIL import Image

from rewardsr.data.images import from_pil, image_size, read_image
from rewardsr.errors import UserError

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
RANDOM = np.random.default_rng(0)


def assert_reads(path, content: bytes, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    """`expected`: (H, W, 3 or 1) in [0, 1]."""
    path.write_bytes(content)
    image = read_image(path).permute(1, 2, 0).numpy()
    assert image.shape == (*expected.shape[:2], 3) and image_size(path) == expected.shape[:2]
    assert np.abs(image - expected).max() <= tolerance


@pytest.mark.parametrize("gamma", [b"", chunk(b"gAMA", struct.pack(">I", 100_000))])
@pytest.mark.parametrize(
    ("depth", "colour"),
    [
        (1, GRAY),
        (2, GRAY),
        (4, GRAY),
        *((depth, colour) for depth in (8, 16) for colour in (GRAY, RGB, GRAY_ALPHA, RGBA)),
    ],
)
def test_png(tmp_path, depth, colour, gamma) -> None:
    channels = {GRAY: 1, RGB: 3, GRAY_ALPHA: 2, RGBA: 4}[colour]
    top = 2**depth - 1
    samples = RANDOM.integers(0, top + 1, (5, 7, channels))
    values = samples / top
    if channels % 2 == 0:
        alpha = values[..., -1:]
        values = values[..., :-1] * alpha + 1 - alpha
    assert_reads(tmp_path / "a.png", png(samples, depth, colour, gamma), values)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_with_one_gray_that_is_transparent(tmp_path, depth) -> None:
    top = 2**depth - 1
    for hidden in {0, 1, top - 1, top}:
        samples = np.array([[[0], [1], [top // 2], [top - 1], [top], [hidden]]])
        values = np.where(samples == hidden, 1, samples / top)
        assert_reads(tmp_path / "a.png", png(samples, depth, GRAY, chunk(b"tRNS", struct.pack(">H", hidden))), values)


@pytest.mark.parametrize("depth", [8, 16])
def test_png_with_one_colour_that_is_transparent(tmp_path, depth) -> None:
    top = 2**depth - 1
    samples = RANDOM.integers(0, top + 1, (2, 3, 3))
    samples[0, 0] = samples[1, 2] = hidden = top, 5, top - 7
    values = np.where((samples == hidden).all(-1, keepdims=True), 1, samples / top)
    assert_reads(tmp_path / "a.png", png(samples, depth, RGB, chunk(b"tRNS", struct.pack(">HHH", *hidden))), values)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_with_a_palette(tmp_path, depth) -> None:
    colours = RANDOM.integers(0, 256, (2**depth, 3))
    opacity = np.full(2**depth, 255)
    opacity[:2] = 0, 100
    samples = RANDOM.integers(0, 2**depth, (4, 6, 1))
    samples[0, :2, 0] = 0, 1
    front = chunk(b"PLTE", colours.astype(np.uint8).tobytes()) + chunk(b"tRNS", bytes([0, 100]))
    alpha = opacity[samples] / 255
    assert_reads(
        tmp_path / "a.png", png(samples, depth, PALETTE, front), colours[samples[..., 0]] / 255 * alpha + 1 - alpha
    )


# ---- TIFF ----

DEEP = RANDOM.integers(0, 65536, (4, 5, 4)).astype(np.uint16)
FLAT = (DEEP >> 8).astype(np.uint8)


def tiff(array: np.ndarray, **options: object) -> bytes:
    """A TIFF as another library than PIL writes it."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_gray_tiff(tmp_path, compression, order) -> None:
    known = {"byteorder": order, "compression": compression}
    for array, top in ((DEEP[..., 0], 65535), (FLAT[..., 0], 255)):
        values = array[..., None] / top
        assert_reads(tmp_path / "a.tif", tiff(array, **known), values)
        if order == "<" or top == 255:  # PIL does not know the other
            assert_reads(tmp_path / "a.tif", tiff(array, photometric="miniswhite", **known), 1 - values)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colour_tiff(tmp_path, compression, order) -> None:
    known = {"byteorder": order, "compression": compression, "photometric": "rgb"}
    assert_reads(tmp_path / "a.tif", tiff(FLAT[..., :3], **known), FLAT[..., :3] / 255)
    assert_reads(tmp_path / "a.tif", tiff(DEEP[..., :3], **known), DEEP[..., :3] / 65535)
    planes = np.ascontiguousarray(np.moveaxis(FLAT[..., :3], 2, 0))
    assert_reads(tmp_path / "a.tif", tiff(planes, planarconfig="separate", **known), FLAT[..., :3] / 255)
    for array, top in ((FLAT, 255), (DEEP, 65535)):
        color, alpha = array[..., :3] / top, array[..., 3:] / top
        laid = color * alpha + 1 - alpha
        assert_reads(tmp_path / "a.tif", tiff(array, extrasamples=["unassalpha"], **known), laid)
        assert_reads(tmp_path / "a.tif", tiff(array, extrasamples=["unspecified"], **known), color)


def test_cmyk_tiff(tmp_path) -> None:
    values = (1 - FLAT[..., :3] / 255) * (1 - FLAT[..., 3:] / 255)
    assert_reads(tmp_path / "a.tif", tiff(FLAT, photometric="separated"), values, 1.5 / 255)
    assert_reads(tmp_path / "a.tif", tiff(DEEP, photometric="separated"), values, 1.5 / 255)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(DEEP[..., 0].astype(np.int32)), "32-bit or signed values"),
        (tiff((DEEP[..., 0] // 2).astype(np.int16)), "32-bit or signed values"),
        (tiff(DEEP[..., 0].astype(np.float32)), "floating-point values"),
        (tiff(FLAT[..., :3], photometric="cielab"), "Lab colours"),
        (tiff(np.moveaxis(DEEP[..., :3], 2, 0).copy(), photometric="rgb", planarconfig="separate"), "in planes"),
    ],
)
def test_tiff_that_cannot_be_read_rightly_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "a.tif")
    assert "a.tif" in str(caught.value) and "save" in str(caught.value)


def test_pil_images_of_rare_modes() -> None:
    big = Image.frombytes("I;16B", (3, 1), struct.pack(">HHH", 0, 300, 65535))
    assert torch.equal(from_pil(big)[0], torch.tensor([[0, 300 / 65535, 1]]))
    rgba = Image.fromarray(FLAT)
    for mode in ("RGBa", "La", "PA"):
        image = rgba.convert({"La": "LA", "PA": "PA"}.get(mode, "RGBA")).convert(mode)
        plain = rgba.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        assert (from_pil(image) - from_pil(plain)).abs().max() < 0.06, mode  # premultiplied colours are rounded


# ---- what is too large ----


@pytest.mark.parametrize(
    "content",
    [
        declared(89_478_486, 1),
        declared(1, 89_478_486),
        declared(50_000, 50_000, 16),
        declared(2**31 - 1, 2**31 - 1),
        b"GIF89a"
        + struct.pack("<HHBBB", 13_000, 13_000, 0, 0, 0)
        + b",\0\0\0\0"
        + struct.pack("<HHB", 13_000, 13_000, 0)
        + b"\2\0;",
        saved("TIFF", np.zeros((1, 1, 3), np.uint8)).replace(b"\1\4\0\1\0\0\0\1\0\0\0", b"\1\4\0\1\0\0\0\0\0\0\x70"),
        b"P5 60000 60000 255\n" + bytes(100),
        saved("BMP", np.zeros((1, 1, 3), np.uint8)).replace(b"(\0\0\0\1\0\0\0\1\0", b"(\0\0\0\xff\xff\0\0\xff\xff"),
        saved("JPEG", np.zeros((1, 1, 3), np.uint8)).replace(b"\x08\0\1\0\1\3", b"\x08\xff\xdc\xff\xdc\3"),
    ],
    ids=["wide", "tall", "png16", "largest", "gif", "tiff", "pgm", "bmp", "jpeg"],
)
def test_bombs_are_refused_from_their_header(tmp_path, content, monkeypatch, recwarn) -> None:
    assert len(content) < 2000
    (tmp_path / "a.bin").write_bytes(content)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    for call in (read_image, image_size):
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"more than 89,478,485 pixels, PIL's safety limit; cut it into parts"):
            call(tmp_path / "a.bin")
        assert time.monotonic() - begun < 1
    assert not recwarn.list


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_chunks_that_unpack_to_gigabytes(tmp_path, name) -> None:
    packed = zlib.compress(bytes(2**27), 9)
    content = b"name\0" + (b"\1\0\0\0" if name == b"iTXt" else b"\0") + packed
    (tmp_path / "a.png").write_bytes(png(np.zeros((2, 2, 3), int), 8, RGB, chunk(name, content)))
    begun = time.monotonic()
    with pytest.raises(UserError, match="cannot read") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value) and time.monotonic() - begun < 1


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path) -> None:
    """Each scan makes the decoder go over the whole image."""
    buffer = io.BytesIO()
    Image.new("L", (3000, 3000), 100).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(whole)
    assert read_image(tmp_path / "a.jpg").shape == (3, 3000, 3000)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(whole[:-2] + 3000 * scan + whole[-2:])
    begun = time.monotonic()
    with pytest.raises(UserError, match="3006 scans of 3000x3000 pixels take minutes"):
        read_image(tmp_path / "a.jpg")
    assert time.monotonic() - begun < 2


@pytest.mark.filterwarnings("ignore")
def test_ycbcr(tmp_path) -> None:
    y, cb, cr = (FLAT[..., channel].astype(float) - (128 if channel else 0) for channel in range(3))
    values = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255) / 255
    image = from_pil(Image.merge("YCbCr", Image.fromarray(FLAT).split()[:3])).permute(1, 2, 0).numpy()
    assert np.abs(image - values).max() <= 1.5 / 255
    content = tiff(FLAT[..., :3], photometric="ycbcr")
    if Image.open(io.BytesIO(content)).mode == "YCbCr":  # older versions of PIL take it for RGB, and refuse it
        assert_reads(tmp_path / "a.tif", content, values, 1.5 / 255)
