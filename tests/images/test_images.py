"""Image files of every kind, good and damaged."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rewardsr.data import images
from rewardsr.data.images import from_pil, image_size, list_images, read_image, to_uint8, write_image
from rewardsr.errors import UserError


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).permute(2, 0, 1).float() / 255


def test_rgb_is_exact(tmp_path, pixels) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    image = read_image(path)
    assert image.dtype == torch.float32 and image.is_contiguous()
    assert torch.equal(image, as_tensor(pixels))
    assert image_size(path) == (6, 9)


def test_write_then_read_gives_the_same_bits(tmp_path, pixels) -> None:
    image = as_tensor(pixels)
    assert torch.equal(read_image(write_image(image, tmp_path / "new" / "a.png")), image)
    assert torch.equal(read_image(write_image(image[None], tmp_path / "new" / "A.PNG")), image)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["A.PNG", "a.png"]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)])
def test_tiny_images(tmp_path, size) -> None:
    image = torch.ones(3, *size) / 3
    path = write_image(image, tmp_path / "a.png")
    assert image_size(path) == size
    assert torch.equal(read_image(path), image)  # 1/3 is 85/255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_modes(tmp_path, pixels, mode) -> None:
    path = tmp_path / {"CMYK": "a.tif", "YCbCr": "a.jpg"}.get(mode, "a.png")
    stored = Image.fromarray(pixels).convert(mode)
    stored.save(path)
    image = read_image(path)
    assert image.shape == (3, 6, 9)
    if mode != "YCbCr":  # JPEG loses some
        assert torch.equal(image, as_tensor(np.array(stored.convert("RGB"))))
    if mode in ("1", "L"):
        assert torch.equal(image[0], image[2])
    assert torch.equal(from_pil(Image.open(path)), image)


def test_transparency_is_laid_on_white(tmp_path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 255
    rgba[0, :, 3] = 0, 51, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert torch.allclose(image[:, 0], torch.tensor([[1.0, 1, 1], [1, 0.8, 0], [1, 0.8, 0]]), atol=1e-6)
    assert torch.equal(from_pil(Image.fromarray(rgba)), image)
    assert float(image.max()) <= 1
    gray = Image.fromarray(np.array([[0, 0]], np.uint8)).convert("LA")
    gray.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    gray.save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[:, 0].tolist() == [[1, 0]] * 3
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[:, 0, 0].tolist() == [1, 1, 1]


def test_16_bit_gray_keeps_its_precision(tmp_path) -> None:
    levels = np.array([[0, 1, 300], [32768, 65534, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert torch.equal(from_pil(Image.open(tmp_path / name)), image)
        assert torch.equal((image * 65535).round(), torch.from_numpy(levels.astype(np.float32)).expand(3, -1, -1)), name


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_png_keeps_its_precision(tmp_path, channels) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (4, 5, channels)).astype(np.uint16)
    levels[..., 3:] = 65535
    order = [2, 1, 0, 3][:channels]  # cv2 writes blue first
    cv2.imwrite(str(tmp_path / "a.png"), levels[..., order])
    image = read_image(tmp_path / "a.png")
    assert torch.equal((image * 65535).round().permute(1, 2, 0), torch.from_numpy(levels[..., :3].astype(np.float32)))


def test_floating_point_files_are_refused(tmp_path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*floating-point"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, pixels, kind, orientation) -> None:
    path = tmp_path / f"a.{kind}"
    stored = Image.fromarray(pixels)
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    with Image.open(path) as opened:
        upright = np.array(ImageOps.exif_transpose(opened))
    image = read_image(path)
    assert torch.equal(image, as_tensor(upright))
    with Image.open(path) as opened:
        assert torch.equal(from_pil(opened), image)
    assert image_size(path) == tuple(image.shape[-2:]) == ((6, 9) if orientation < 5 else (9, 6))


def test_content_decides_not_the_extension(tmp_path, pixels) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert torch.equal(read_image(tmp_path / "a.jpg"), as_tensor(pixels))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncated_and_corrupt(tmp_path, kind) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:10], b"", b"no image at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read") as caught:
            read_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an image"):
        image_size(path)


def test_corrupt_in_the_middle(tmp_path, pixels) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png"):
        read_image(path)


def test_truncated_16_bit_colour(tmp_path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 65536, (32, 32, 3)).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot read") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_libraries_below_do_not_add_to_the_one_line(tmp_path, capfd) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[100:1000] = bytes(900)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif"):
        read_image(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"stderr is as it was")
    assert capfd.readouterr().err == "stderr is as it was"


def test_pixel_bombs_are_refused(tmp_path, pixels, monkeypatch) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="safety limit"):
        read_image(tmp_path / "a.png")


def test_pil_images_that_cannot_be_read(tmp_path, pixels) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    for image in (Image.open(tmp_path / "b.png"), Image.new("F", (3, 3))):
        with pytest.raises(UserError, match=f"cannot read 'PIL image of mode {image.mode}'"):
            from_pil(image)


def test_missing_and_folders(tmp_path) -> None:
    for call in (read_image, image_size):
        with pytest.raises(UserError, match=r"no image file .*nothing\.png"):
            call(tmp_path / "nothing.png")
        with pytest.raises(UserError, match="it is a folder"):
            call(tmp_path)


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 1.1])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.tensor([float("nan")]))


def test_write_refuses_what_is_no_image(tmp_path) -> None:
    with pytest.raises(UserError, match=r"\.png"):
        write_image(torch.zeros(3, 2, 2), tmp_path / "a.jpg")
    for shape in ((2, 3, 4, 4), (1, 4, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match="expected"):
            write_image(torch.zeros(shape), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = write_image(torch.zeros(3, 2, 2), tmp_path / "a.png")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.png.*No space left"):
        write_image(torch.ones(3, 2, 2), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_write_below_a_file(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_image(torch.zeros(3, 2, 2), tmp_path / "file" / "a.png")


def test_list_images(tmp_path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden.png", "d.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "d.webp"]


def test_list_images_of_nothing(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder"):
        list_images(tmp_path / "missing")
    with pytest.raises(UserError, match="no images in"):
        list_images(tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match=r"not searched \(inside\)"):
        list_images(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="it is a file"):
        list_images(tmp_path / "file")


def test_orientation_behind_the_pixels_is_not_looked_for(tmp_path, pixels, monkeypatch) -> None:
    """`image_size` of a PNG reads its header only."""
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert images.image_size(tmp_path / "a.png") == (6, 9)
