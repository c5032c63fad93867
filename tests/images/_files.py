"""Image files made byte by byte, for what PIL does not write, and what must come out of them."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples: np.ndarray, depth: int, colour: int, front: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of samples (H, W, C), with chunks in front of the pixels and behind them."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :] for row in rows]
        packed = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + header + front + pixels + behind + chunk(b"IEND", b"")


def declared(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of a few bytes that says to be of this size."""
    whole = png(np.zeros((1, 1, 3), np.uint8), 8, 2)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return whole[:8] + header + whole[8 + len(header) :]


def exif_of(orientation: int) -> bytes:
    """An EXIF block that holds nothing but an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def raw_profile(orientation: int) -> bytes:
    """The text chunk in which ImageMagick keeps EXIF."""
    content = exif_of(orientation)
    return chunk(
        b"zTXt",
        b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode())),
    )


def marks(orientation: int) -> dict[str, bytes]:
    """Every way in which a PNG carries an orientation, as chunks."""
    return {
        "exif": chunk(b"eXIf", exif_of(orientation).removeprefix(b"Exif\0\0")),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % orientation),
        "raw": raw_profile(orientation),
    }


def saved(kind: str, array: np.ndarray, **options: Any) -> bytes:
    """An image as PIL writes it."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def upright(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8, as PIL itself sets an image upright."""
    with Image.open(io.BytesIO(content)) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
