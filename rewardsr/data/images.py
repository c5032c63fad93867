"""Image files to tensors and back.

Files come in every shape that PIL reads; inside there is one: (3, H, W) float32 RGB in [0, 1].
"""

import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from rewardsr.data.rows import Stored
from rewardsr.data.strict import check_pixels, reading, without_remarks
from rewardsr.errors import UserError
from rewardsr.storage import expand, write_bytes

logger = logging.getLogger(__name__)

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# Of these the header tells the size of what comes out; others (icons, say) are decoded for it.
_SIZED = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "PPM", "TIFF")
# No images here: PIL hands them to other programs, only knows that they exist, or unpacks them without a limit.
_FOREIGN = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS")
# Files that people take for images, whether this PIL reads them or not.
_LOOK_LIKE_IMAGES = (
    ".png .jpg .jpeg .jfif .webp .avif .heic .heif .hif .jxl .jp2 .tif .tiff .bmp .gif .svg .eps .exr .hdr "
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2"
)
_DEEP_PNG = ("RGB;16B", "RGBA;16B", "LA;16B")  # how PIL calls what it cuts down to 8 bits
_GRAY_STEPS = {"L;2": 85, "L;4": 17}  # of a PNG with 2 or 4 bits of gray, spread over 8

_JPEG_WORK = 2 * 10**10  # scans times pixels: some ten seconds; an everyday file has at most a dozen scans
_ODD_MODES = {"F": "floating-point values", "LAB": "Lab colours"}
_ROWS = 256  # that are converted at a time
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_EXTRA = 258, 262, 284, 338


def read_image(path: Stored | str) -> Tensor:
    """Read one image file; any number of threads may at a time.

    Gray and palette images become RGB, CMYK by PIL's plain conversion (colour profiles and gamma are not applied). What
    is transparent is laid on white. The orientation is applied wherever PIL finds it. Of an animation the first frame
    counts. PNG, TIFF and 16-bit gray images keep their precision; of other 16-bit colour PIL reads the upper 8 bits.

    Args:
        path: the file, or the row of a table; its content decides what it is, not its extension.

    Returns:
        (3, H, W) float32 RGB in [0, 1].

    Raises:
        UserError: missing, damaged, truncated, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or not an image.
    """
    return _floats(read_pixels(path))


def read_pixels(path: Stored | str) -> Tensor:
    """What `read_image` reads, as uint8 where the file has no more than 8 bits and nothing transparent.

    Returns:
        (3, H, W) RGB: uint8, or float32 in [0, 1]; in any order in memory.

    Raises:
        UserError: as `read_image`.
    """
    with opened(path) as (image, file):
        return _decode(image, file)


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as `read_image` gives one of a file: (3, H, W) float32 RGB in [0, 1]; of a 16-bit colour PNG 8 bits.

    Raises:
        UserError: its file is damaged or truncated, or the mode has no such form.
    """
    with reading(f"PIL image of mode {image.mode}"):
        return _floats(_decode(image))


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) RGB in [0, 1], clamped and rounded, as an 8-bit PIL image.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"expected an image (3, H, W) or (1, 3, H, W), got {tuple(image.shape)}")
    return Image.fromarray(levels(image))


def levels(image: Tensor, deep: bool = False) -> np.ndarray:
    """(C, H, W) in [0, 1] as an array (H, W, C) of uint8, or of uint16, clamped and rounded, a few rows at a time.

    Raises:
        ValueError: values that are not finite.
    """
    array = np.empty((*image.shape[1:], image.shape[0]), np.uint16 if deep else np.uint8)
    for first in range(0, len(array), _ROWS):
        some = image[:, first : first + _ROWS].detach().float().cpu()
        if not some.isfinite().all():
            raise ValueError("the image holds values that are not finite")
        whole = (some.double() if deep else some).clamp(0, 1).mul_(65535 if deep else 255).round_()
        array[first : first + _ROWS] = whole.permute(1, 2, 0).numpy()
    return array


def image_size(path: Stored | str) -> tuple[int, int]:
    """Height and width of what `read_image` gives, in pixels; of everyday files from the header alone.

    Raises:
        UserError: missing, too large, or no image that PIL knows.
    """
    with opened(path) as (image, file):
        width, height = image.size
        if image.format in _SIZED and not (image.format == "PNG" and _is_turned_late(image, file)):
            # getexif() would decode a PNG without EXIF in front, to look behind the pixels.
            orientation = 1 if image.format == "PNG" and "exif" not in image.info else _orientation(image)
            if orientation not in _TURNED:
                return height, width
            if image.format != "TIFF":  # whose `size` is turned already, or not, by PIL's version
                return width, height
        height, width = _decode(image, file).shape[-2:]
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
    path = png_path(path)
    write_bytes(path, encode_png(image))
    return path


def png_path(path: Path | str) -> Path:
    """The place that `write_image` writes to, with `~` replaced.

    Raises:
        UserError: it does not end in .png.
    """
    path = expand(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write '{path}': images are written as PNG, let the name end in .png")
    return path


def encode_png(image: Tensor) -> bytes:
    """An image (3, H, W) or (1, 3, H, W) as an 8-bit PNG; errors are those of `to_pil`."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def list_images(folder: Path | str, deep: bool = False) -> list[Path]:
    """Image files of a folder of all kinds that PIL reads, sorted by name, and by folder before that.

    Hidden files and folders are left out. A warning names what looks like an image but is none that can be read here.

    Args:
        folder: where to look.
        deep: also in the folders inside it.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'" + (": it is a file" if folder.exists() else ""))
    try:
        entries = sorted(_entries(folder, deep))
        images = [path for path in entries if path.suffix.lower() in _extensions() and path.is_file()]
    except OSError as error:
        raise UserError(f"cannot list '{error.filename or folder}': {error.strerror or error}") from error
    known = set(images)
    skipped = [f"{path.name} ({why})" for path in entries if path not in known and (why := _why_not(path))]
    what = f"{len(skipped)} look like images and are skipped: {', '.join(skipped[:3])}" + ", ..." * (len(skipped) > 3)
    if not images:
        inside = [] if deep else [path.name for path in entries if path.is_dir()]
        hint = f"; folders inside it are not searched ({', '.join(inside[:3])})" if inside else ""
        looked = "looked for .png, .jpg, .webp, .tif and whatever else PIL reads"
        raise UserError(f"no images in '{folder}' ({looked}){hint}{'; ' + what if skipped else ''}")
    if skipped:
        logger.warning("'%s': %s", folder, what)
    return images


def _entries(folder: Path, deep: bool, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What a folder holds, hidden things aside; links that lead back up are not followed."""
    above = above | {folder.resolve()}
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if deep and path.is_dir() and path.resolve() not in above:
            yield from _entries(path, deep, above)
        else:
            yield path


def _why_not(path: Path) -> str | None:
    """Why a file that seems to be an image is none; None for what does not seem to be one."""
    suffix = path.suffix.lower()
    if suffix not in _extensions() and suffix not in _LOOK_LIKE_IMAGES.split():
        return None
    if path.is_symlink() and not path.exists():
        return "dead link"
    if not path.is_file():
        return None if path.is_dir() else "no regular file"
    return f"this PIL does not read {suffix}"


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _FOREIGN)


@cache
def _extensions() -> frozenset[str]:
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if suffix and name in formats)


@contextmanager
def opened(path: Stored | str) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, not decoded yet, and its file."""
    path = Path(path) if isinstance(path, str) else path
    with reading(path):
        if isinstance(path, Path) and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"no image file '{path}'" + (f": it is {what}" if path.exists() else ""))
        # Not by name: PIL 13 maps uncompressed files into memory as of their turned size, and mixes up their pixels.
        with path.open("rb") as file, Image.open(file, formats=_formats()) as image:
            check_pixels(image)
            yield image, file


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _is_turned_late(image: Image.Image, file: BinaryIO) -> bool:
    """Whether a PNG may carry an orientation that PIL finds only after it has decoded the pixels."""
    marks = {False: False, True: False}  # before the pixels, behind them
    place, behind = 8, False
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return marks[True] or (marks[False] and "exif" not in image.info)
        length, name = struct.unpack(">I4s", head)
        behind = behind or name == b"IDAT"
        keyword = file.read(min(length, 80)).lower() if name in (b"tEXt", b"zTXt", b"iTXt") else b""
        marks[behind] |= name == b"eXIf" or any(word in keyword for word in (b"exif", b"xmp"))
        place += length + 12


def _decode(image: Image.Image, file: BinaryIO | None = None) -> Tensor:
    """(3, H, W), uint8 or float32 in [0, 1], upright and on white, in any order in memory; arguments of `layers`."""
    colours, alpha = layers(image, file)
    return colours if alpha is None else (colours * alpha + (1 - alpha)).clamp(0, 1)


def layers(image: Image.Image, file: BinaryIO | None = None) -> tuple[Tensor, Tensor | None]:
    """Colours (3, H, W), and alpha (1, H, W) where something is transparent: uint8 or float32 in [0, 1], upright.

    Args:
        image: not decoded yet.
        file: where it is in; gives the deep pixels that PIL has no mode for.
    """
    deep, turned = file is not None and is_deep(image), _tiff_orientation(image)
    if file is not None and image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # marks the beginning of each, and stands nowhere inside of one
        if scans * image.width * image.height > _JPEG_WORK:
            raise ValueError(f"{scans} scans of {image.height}x{image.width} pixels take minutes; save it anew")
    stored = _stored(image)
    colour = deep and not image.mode.startswith("I")
    with without_remarks() if deep or image.format == "TIFF" else nullcontext():
        image.load()
        check_pixels(image)  # of an icon, now that its size is known
        pixels = _deep_colour(image, file) if colour and file is not None else _pixels(image, stored)
    # Only now: PIL finds what stands behind the pixels, and has turned a TIFF by itself.
    turn = turned if colour and image.format == "TIFF" else _orientation(image)
    if pixels.shape[0] in (1, 3):
        return _upright(pixels.expand(3, -1, -1), turn), None
    return _upright(pixels[:-1].expand(3, -1, -1), turn), _upright(pixels[-1:], turn)


def is_deep(image: Image.Image) -> bool:
    """Whether an image, not decoded yet, has 16 bits a channel that are read as such."""
    if image.format == "PNG":
        return _stored(image) in _DEEP_PNG or image.mode.startswith("I")
    if image.format != "TIFF" or image.mode.startswith("I"):
        return image.mode.startswith("I")
    tags = getattr(image, "tag_v2", {})
    plain = tags.get(_TIFF_PHOTOMETRIC) == 2 and tags.get(_TIFF_PLANAR, 1) == 1 and set(tags.get(339, (1,))) == {1}
    return plain and set(tags.get(_TIFF_BITS, ())) == {16} and tags.get(_TIFF_EXTRA, (2,)) in ((0,), (2,))


def _stored(image: Image.Image) -> str:
    return str(image.tile[0][3]) if isinstance(image, ImageFile.ImageFile) and image.tile else ""


def _tiff_orientation(image: Image.Image) -> int:
    value = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
    return value if value in range(1, 9) else 1


def _floats(pixels: Tensor) -> Tensor:
    """(3, H, W) float32 in [0, 1], in this order in memory."""
    return pixels.contiguous().float().div_(255) if pixels.dtype == torch.uint8 else pixels.contiguous()


def _pixels(image: Image.Image, stored: str) -> Tensor:
    """(1 or 3, H, W), or one channel more for alpha: uint8 of 8-bit colour without alpha, else float32 in [0, 1]."""
    tiff = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode.startswith("I"):  # 16-bit gray; older versions of PIL widen it to 32 bit
        gray = np.array(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535 or (tiff and image.mode == "I"):
            raise ValueError("32-bit or signed values; save it with 8 bits, or 16 without sign")
        hidden = image.info.get("transparency")
        if tiff.get(_TIFF_PHOTOMETRIC) == 0:  # zero is white, which PIL heeds up to 8 bits
            gray = 65535 - gray
        levels = torch.from_numpy(gray)[None].float().div_(65535)
        return levels if hidden is None else torch.cat([levels, torch.from_numpy(gray != hidden)[None].float()])
    if image.mode in ("F", "LAB"):
        raise ValueError(f"{_ODD_MODES[image.mode]}; save it as RGB with 8 or 16 bits")
    if tiff.get(_TIFF_PLANAR) == 2 and max(tiff.get(_TIFF_BITS, (8,))) > 8:
        raise ValueError("16-bit colour in planes; save its channels interleaved, or as PNG")
    if stored in _GRAY_STEPS and isinstance(image.info.get("transparency"), int):
        image = image.copy()
        image.info["transparency"] *= _GRAY_STEPS[stored]
    if image.mode == "La":
        image = image.convert("LA")
    array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    return pixels.contiguous().float().div_(255) if len(pixels) == 4 else pixels


def _deep_colour(image: Image.Image, file: BinaryIO) -> Tensor:
    """(3, H, W) or (4, H, W); PIL has decoded the file before, so it is whole."""
    try:
        import cv2  # comes with pyiqa
    except ImportError as error:
        raise ValueError("16-bit colour needs opencv: pip install opencv-python-headless") from error
    file.seek(0)
    array = cv2.imdecode(np.frombuffer(file.read(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16 or array.ndim != 3:
        raise ValueError("16-bit colour that opencv cannot read; save it with 8 bits")
    unknown = getattr(image, "tag_v2", {}).get(_TIFF_EXTRA) == (0,)  # what the fourth means is not said
    order = [2, 1, 0, 3][: 3 if unknown else array.shape[2]]  # opencv has blue first
    return torch.from_numpy(array[..., order].astype(np.float32)).permute(2, 0, 1) / 65535


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation: 2-4 are flips and half turns, 5-8 swap the axes."""
    if orientation in _TURNED:
        image = image.transpose(-2, -1)  # 5 is just that; 6, 7, 8 are flipped besides
    if orientation in (2, 3, 6, 7):
        image = image.flip(-1)
    if orientation in (3, 4, 7, 8):
        image = image.flip(-2)
    return image
