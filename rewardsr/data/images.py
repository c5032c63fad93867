"""Image files to tensors and back.

Files come in every shape that PIL reads; inside there is one: (3, H, W) float32 RGB in [0, 1].
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from rewardsr.errors import UserError
from rewardsr.storage import write_bytes

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width


def read_image(path: Path | str) -> Tensor:
    """Read one image file.

    Gray and palette images become RGB, CMYK by PIL's plain conversion (colour profiles are not applied). What is
    transparent is laid on white. EXIF orientation is applied. Of an animation the first frame counts. 16-bit gray
    images and 16-bit colour PNG keep their precision; PIL reads 16-bit colour TIFF as 8 bit.

    Args:
        path: the file; its content decides what it is, not its extension.

    Returns:
        (3, H, W) float32 RGB in [0, 1].

    Raises:
        UserError: missing, damaged, truncated, too large for PIL's safety limit, or not an image.
    """
    path = _existing(path)
    with _reading(path), Image.open(path) as image:
        return _convert(image, (lambda _: _deep_png(path)) if _is_deep_png(path, image) else _pixels)


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as `read_image` gives one of a file: (3, H, W) float32 RGB in [0, 1]; of a 16-bit colour PNG 8 bits.

    Raises:
        UserError: its file is damaged or truncated, or the mode has no such form.
    """
    with _reading(f"PIL image of mode {image.mode}"):
        return _convert(image, _pixels)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) RGB in [0, 1], clamped and rounded, as an 8-bit PIL image.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"expected an image (3, H, W) or (1, 3, H, W), got {tuple(image.shape)}")
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy())


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width in pixels after EXIF orientation, from the header alone: quick, but blind to truncation.

    Raises:
        UserError: missing, or no image that PIL knows.
    """
    path = _existing(path)
    with _reading(path), Image.open(path) as image:
        width, height = image.size
        if _orientation(image) not in _TURNED:
            return height, width
        if image.format != "TIFF":
            return width, height
    height, width = read_image(path).shape[-2:]  # whether `size` is turned already depends on PIL's version
    return height, width


def to_uint8(image: Tensor) -> Tensor:
    """Image values [0, 1] as uint8 0..255, clamped and rounded; any shape.

    Raises:
        ValueError: NaN or infinity, which would silently become black.
    """
    image = image.detach()
    if not image.isfinite().all():
        raise ValueError("to_uint8: the image holds values that are not finite")
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)


def write_image(image: Tensor, path: Path | str) -> Path:
    """Write an 8-bit PNG in one step: the file is there whole or not at all. Missing folders are made.

    Args:
        image: (3, H, W) or (1, 3, H, W) RGB in [0, 1]; clamped and rounded.
        path: ends in .png; a file of this name is replaced.

    Returns:
        The path.

    Raises:
        UserError: another extension, no space, or no permission.
        ValueError: another shape, or values that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write '{path}': images are written as PNG, let the name end in .png")
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
    return path


def list_images(folder: Path | str) -> list[Path]:
    """Image files of a folder (not of folders inside it), sorted by name; hidden files are left out.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'" + (": it is a file" if folder.exists() else ""))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot list '{folder}': {error.strerror or error}") from error
    images = [path for path in entries if _looks_like_image(path)]
    if not images:
        inside = [path.name for path in entries if path.is_dir()]
        hint = f"; folders inside it are not searched ({', '.join(inside[:3])})" if inside else ""
        raise UserError(f"no images in '{folder}' (looked for {', '.join(EXTENSIONS)}){hint}")
    return images


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no image file '{path}'" + (": it is a folder" if path.is_dir() else ""))
    return path


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Turns what goes wrong while `what` is read into one line, and refuses truncated files."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # PIL's global switch, which some packages turn on when they are imported
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read '{what}': more pixels than PIL's safety limit; cut it into parts") from error
    except PermissionError as error:
        raise UserError(f"cannot read '{what}': no permission") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"cannot read '{what}': not an image, or damaged at its beginning") from error
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read '{what}': damaged, truncated or of an unknown kind ({reason})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _orientation(image: Image.Image) -> int:
    # Of a PNG without EXIF in front of its pixels, getexif() would decode the pixels to look behind them.
    if image.format == "PNG" and not ({"exif", "Raw profile type exif"} & image.info.keys()):
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _convert(image: Image.Image, pixels: Callable[[Image.Image], Tensor]) -> Tensor:
    """(3, H, W) float32 in [0, 1], upright and on white; `pixels` is called when the image is loaded."""
    before = _orientation(image)
    image.load()
    # PIL turns TIFF pixels by itself from version 11.1 on, and then the tag is gone.
    orientation = _orientation(image) if image.format == "TIFF" else before
    return _upright(_to_rgb(pixels(image)), orientation).contiguous()


def _pixels(image: Image.Image) -> Tensor:
    """(1, H, W), (3, H, W) or (4, H, W) float32 in [0, 1], as stored."""
    if image.mode.startswith("I"):  # 16-bit gray; older versions of PIL widen it to 32 bit
        gray = np.array(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit values; save it with 8 or 16 bits")
        return torch.from_numpy(gray)[None].float() / 65535
    if image.mode == "F":
        raise ValueError("floating-point values; save it with 8 or 16 bits")
    array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _is_deep_png(path: Path, image: Image.Image) -> bool:
    """Whether this is a colour PNG with 16 bits a channel, of which PIL keeps only the upper 8."""
    if image.format != "PNG":
        return False
    with path.open("rb") as file:
        header = file.read(26)
    depth, colour = header[24], header[25]
    return depth == 16 and colour in (2, 6)  # RGB, RGBA


def _deep_png(path: Path) -> Tensor:
    """(3, H, W) or (4, H, W); PIL has decoded the file before, so it is whole."""
    try:
        import cv2  # comes with pyiqa
    except ImportError as error:
        raise ValueError("16-bit colour needs opencv: pip install opencv-python-headless") from error
    array = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16:
        raise ValueError("16-bit colour that opencv cannot read; save it with 8 bits")
    order = [2, 1, 0, 3][: array.shape[2]]  # opencv has blue first
    return torch.from_numpy(array[..., order].astype(np.float32)).permute(2, 0, 1) / 65535


def _to_rgb(pixels: Tensor) -> Tensor:
    if pixels.shape[0] == 1:
        return pixels.repeat(3, 1, 1)
    if pixels.shape[0] == 4:
        alpha = pixels[3:]
        return (pixels[:3] * alpha + (1 - alpha)).clamp(0, 1)
    return pixels


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation: 2-4 are flips and half turns, 5-8 swap the axes."""
    if orientation in _TURNED:
        image = image.transpose(-2, -1)  # 5 is just that; 6, 7, 8 are flipped besides
    if orientation in (2, 3, 6, 7):
        image = image.flip(-1)
    if orientation in (3, 4, 7, 8):
        image = image.flip(-2)
    return image
