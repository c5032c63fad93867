"""Results as files: PNG, JPEG, WebP and TIFF, with what came along in the file they were made from.

Kept are transparency, the ICC profile, EXIF and 16 bits a channel, where the format has a place for them. The picture
stays as large on paper: its resolution grows with its pixels.
"""

import io
import logging
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor
from torch.nn import functional as F

from rewardsr.data.images import is_deep, layers, levels, opened
from rewardsr.data.rows import Stored
from rewardsr.data.strict import reading
from rewardsr.errors import UserError, one_line

logger = logging.getLogger(__name__)

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}
_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
_LONGEST = {"jpeg": 65_535, "webp": 16_383}  # sides that the formats can hold
_MOST_EXIF = 65_527  # bytes in a JPEG
# What EXIF says of the old pixels: their layout, orientation, resolution and thumbnail, and what is new.
_OF_THE_FILE = {
    *range(254, 260),
    262,
    *range(273, 285),
    296,
    317,
    *range(320, 326),
    338,
    339,
    513,
    514,
    530,
    531,
    34675,
}
_RESOLUTION, _INCH = (282, 283, 296), 2  # across, down, and their unit


@dataclass(frozen=True)
class Picture:
    """An image with what its file says besides.

    Attributes:
        colours: (3, H, W) float32 in [0, 1], upright; those under what is quite transparent come from around it.
        alpha: (1, H, W) float32, 0 transparent; None: nothing is.
        deep: whether the file has 16 bits a channel.
        icc: profile of RGB colours.
        exif: as PIL has it.
        dpi: resolution across and down.
    """

    colours: Tensor
    alpha: Tensor | None = None
    deep: bool = False
    icc: bytes | None = None
    exif: Image.Exif | None = None
    dpi: tuple[float, float] | None = None


def read_picture(source: Stored | Image.Image) -> Picture:
    """An image file, or a PIL image.

    Raises:
        UserError: as `read_image`.
    """
    if isinstance(source, Image.Image):
        with reading(f"PIL image of mode {source.mode}"):
            return _picture(source, None)
    with opened(source) as (image, file):
        return _picture(image, file)


def format_of(path: Path) -> str | None:
    """The format that the name of a file asks for; None: none of those written here."""
    return _SUFFIXES.get(path.suffix.lower())


def check_format(name: str, quality: int) -> None:
    """Refuse what is not written here.

    Raises:
        UserError: unknown format, or a quality out of range.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format '{name}': choose one of {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}, expected 1 to 100")


def check_size(name: str, size: tuple[int, int], what: object) -> None:
    """Refuse an image, height and width in pixels, that the format cannot hold.

    Raises:
        UserError: a side is too long.
    """
    most = _LONGEST.get(name)
    if most is not None and max(size) > most:
        raise UserError(
            f"'{what}' becomes {size[0]}x{size[1]} pixels, and {name} holds {most} a side: choose png or tiff"
        )


def lost(picture: Picture, name: str) -> list[str]:
    """What of a picture the format has no place for."""
    found = ["16 bits (8 are written)"] if picture.deep and name in ("jpeg", "webp") else []
    return found + (["transparency (white is written)"] if picture.alpha is not None and name == "jpeg" else [])


def encode(sr: Tensor, picture: Picture, scale: int, name: str = "png", quality: int = 95) -> bytes:
    """A result as the content of a file.

    Args:
        sr: (3, H, W) in [0, 1].
        picture: what it was made from; its alpha is enlarged here.
        scale: `sr` is this many times as large.
        name: of the format.
        quality: of JPEG and WebP; WebP of 100 is lossless.

    Raises:
        ValueError: values that are not finite.
    """
    deep = picture.deep and name in ("png", "tiff")
    array = to_array(sr, picture, deep, on_white=name == "jpeg")
    dpi = None if picture.dpi is None else (picture.dpi[0] * scale, picture.dpi[1] * scale)
    exif = _exif(picture.exif, array.shape[:2], dpi)
    if exif is not None and name == "jpeg" and len(exif.tobytes()) > _MOST_EXIF:
        logger.warning("EXIF of more than 64 KB has no place in a JPEG, and is left out")
        exif = None
    if name == "tiff":
        return _tiff(array, picture.icc, exif, dpi)
    if deep:
        return _deep_png(array, picture.icc, exif, dpi)
    options: dict[str, Any] = {"icc_profile": picture.icc, "exif": exif, "dpi": dpi}
    if name == "jpeg":
        options |= {"quality": quality, "subsampling": 0}
    elif name == "webp":
        options |= {"quality": quality, "lossless": quality == 100, "exact": True}
    buffer = io.BytesIO()
    given = {key: value for key, value in options.items() if value is not None}
    Image.fromarray(array).save(buffer, format=name, **given)
    return buffer.getvalue()


def to_array(sr: Tensor, picture: Picture, deep: bool = False, on_white: bool = False) -> np.ndarray:
    """A result (3, H, W) as (H, W, 3 or 4) of uint8 or uint16, with the alpha of its picture or laid on white."""
    array = levels(sr, deep)
    if picture.alpha is None:
        return array
    alpha = levels(_enlarged(picture.alpha, array.shape[:2]), deep)
    return _on_white(array, alpha) if on_white else np.concatenate([array, alpha], -1)


def _picture(image: Image.Image, file: Any) -> Picture:
    deep = file is not None and is_deep(image)
    # PIL finds that of a PNG behind its pixels, and closes a TIFF once it has read them.
    early = _own_exif(image) if image.format == "TIFF" else None
    colours, alpha = layers(image, file)
    colours = colours.contiguous().float().div_(255) if colours.dtype == torch.uint8 else colours.contiguous().float()
    if alpha is not None:
        alpha = alpha.contiguous().float()
        colours, alpha = _filled(colours, alpha), (None if bool((alpha == 1).all()) else alpha)
    icc = image.info.get("icc_profile")
    return Picture(
        colours,
        alpha,
        deep,
        icc if isinstance(icc, bytes) and icc[16:20] == b"RGB " else None,
        early if image.format == "TIFF" else _own_exif(image),
        _dpi(image.info.get("dpi")),
    )


def _own_exif(image: Image.Image) -> Image.Exif | None:
    exif = image.getexif()
    try:
        for tag in _FOLDERS:
            exif.get_ifd(tag)
        return exif if len(exif) and exif.tobytes() else None
    except Exception as error:  # cameras write what PIL reads and cannot write
        logger.warning("EXIF cannot be kept (%s)", one_line(error))
        return None


def _dpi(given: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in given)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if all(math.isfinite(v) and 1 < v < 1e5 for v in (across, down)) else None


def _filled(colours: Tensor, alpha: Tensor) -> Tensor:
    """Colours, where nothing of them is seen, of what is seen nearby: an enlarged edge takes in both."""
    weight, total = (alpha > 0).float()[None], (colours * (alpha > 0))[None]
    if bool(weight.all()) or not bool(weight.any()):
        return colours
    sizes = []
    while min(weight.shape[-2:]) > 1 and not bool(weight.all()):
        sizes.append((weight, total))
        weight, total = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (weight, total))
    filled = total / weight.clamp_min(1e-12)
    for weight, total in reversed(sizes):
        wide = F.interpolate(filled, size=weight.shape[-2:], mode="nearest")
        filled = torch.where(weight > 0, total / weight.clamp_min(1e-12), wide)
    return filled[0]


def _enlarged(alpha: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(alpha[None], size=size[:2], mode="bicubic", antialias=True)[0].clamp(0, 1)


def _on_white(array: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha.astype(np.uint16)
    return ((array * part + 255 * (255 - part) + 127) // 255).astype(np.uint8)


def _exif(given: Image.Exif | None, size: tuple[int, ...], dpi: tuple[float, float] | None) -> Image.Exif | None:
    """EXIF for upright pixels of this size: without orientation and thumbnail."""
    if given is None:
        return None
    exif = Image.Exif()
    exif.update({tag: value for tag, value in given.items() if tag not in _OF_THE_FILE and tag not in _FOLDERS})
    for tag in _FOLDERS:
        found = given.get_ifd(tag)
        if found:
            exif[tag] = dict(found)
    if ExifTags.IFD.Exif in exif:
        sides = {ExifTags.Base.ExifImageWidth: size[1], ExifTags.Base.ExifImageHeight: size[0]}
        exif[ExifTags.IFD.Exif] |= {int(tag): side for tag, side in sides.items()}
    if dpi is not None:
        exif.update(dict(zip(_RESOLUTION, (*dpi, _INCH), strict=True)))
    own = Image.Exif()
    own.load(exif.tobytes())  # PIL writes a TIFF's folders only from what it has read
    return own


_FOLDERS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


def _deep_png(array: np.ndarray, icc: bytes | None, exif: Image.Exif | None, dpi: tuple[float, float] | None) -> bytes:
    """PIL writes no 16-bit colour: opencv does, and what else belongs into the file follows its header."""
    import cv2  # comes with pyiqa

    done, content = cv2.imencode(".png", np.ascontiguousarray(array[..., [2, 1, 0, 3][: array.shape[2]]]))
    if not done:
        raise ValueError("opencv cannot write this image")
    whole = content.tobytes()
    chunks = []
    if icc is not None:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if dpi is not None:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1)))
    if exif is not None:
        chunks.append((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    packed = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    end = 8 + 25  # of the signature and the header chunk
    return whole[:end] + b"".join(packed) + whole[end:]


def _tiff(array: np.ndarray, icc: bytes | None, exif: Image.Exif | None, dpi: tuple[float, float] | None) -> bytes:
    """One deflated strip. PIL writes the tags alone: it has no 16-bit colour, and loses EXIF where it compresses."""
    height, width, channels = array.shape
    strip = zlib.compress(array.astype("<u2" if array.dtype == np.uint16 else "u1").tobytes())
    tags: Any = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in () if exif is None else exif.items():
        tags[tag] = dict(exif.get_ifd(tag)) if exif is not None and tag in _FOLDERS else value
    tags[256], tags[257], tags[258], tags[259], tags[262] = width, height, (8 * array.itemsize,) * channels, 8, 2
    tags[273], tags[277], tags[278], tags[279], tags[284] = 0, channels, height, len(strip), 1
    if channels == 4:
        tags[338] = 2  # alpha that the colours are not multiplied by
    if dpi is not None:
        tags[282], tags[283], tags[296] = *dpi, _INCH
    if icc is not None:
        tags[34675] = icc
    buffer = io.BytesIO()
    tags.save(buffer)
    buffer.write(strip)
    return buffer.getvalue()
