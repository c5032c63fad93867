"""The reference vectors and tiny networks of `tests/data`, unpacked: tests read them under `DATA`, never in place.

Large files are checked in as `NAME.packed`. Importing this module unpacks them into `DATA`, a folder that git ignores,
and copies the others along; what is there already with the right content stays. To add a file, put it into
`tests/data` and pack it, which replaces it by `FILE.packed`:

    python tests/_data.py FILE...

Text that is small or worth reading in a diff stays as it is. A packed file is a line of JSON (the SHA-256 of the
original, and its sections as width of an element and length, in bytes) and then LZMA2 streams: the first bytes of all
elements of a section, the second ones, and so on. Exponents of floats are alike, and compress once they are together.
"""

import hashlib
import json
import lzma
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent / "data"
DATA = SOURCE / ".unpacked"
SUFFIX = ".packed"
# The decoder is told the longest reach alone; the rest stands in the stream.
DECODER = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
# For noise, whose chance matches do not pay, and for text.
ENCODERS = (
    {"dict_size": 1 << 12, "depth": 1, "lc": 0, "lp": 0, "pb": 0},
    {"dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0},
    {"dict_size": 1 << 20, "lc": 4, "lp": 0, "pb": 0},
)


def _sections(name: str, content: bytes) -> list[tuple[int, int]]:
    """Width of an element and length of each part of a file, in bytes."""
    if name.endswith(".pkl"):
        return [(4, len(content))]  # PyTorch lets float32 tensors begin at multiples of four
    if not name.endswith(".safetensors"):
        return [(1, len(content))]
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = [value for key, value in json.loads(content[8:start]).items() if key != "__metadata__"]
    sections = [(1, start)]
    for tensor in sorted(tensors, key=lambda tensor: tensor["data_offsets"]):
        begin, end = tensor["data_offsets"]
        width = (end - begin) // max(1, math.prod(tensor["shape"]))
        if width == sections[-1][0]:
            sections[-1] = (width, sections[-1][1] + end - begin)
        elif width:
            sections.append((width, end - begin))
    return sections


def _compress(plane: bytes) -> bytes:
    chains = ([{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME} | encoder] for encoder in ENCODERS)
    return min((lzma.compress(plane, lzma.FORMAT_RAW, filters=chain) for chain in chains), key=len)


def pack(name: str, content: bytes) -> bytes:
    """The packed form of a file; its name tells how it is laid out."""
    sections = _sections(name, content)
    about = {"sha256": hashlib.sha256(content).hexdigest(), "sections": sections}
    packed, start = [json.dumps(about).encode() + b"\n"], 0
    for width, length in sections:
        part = content[start : start + length]
        packed += [_compress(part[place::width]) for place in range(width)]
        start += length
    return b"".join(packed)


def unpack(packed: bytes) -> bytes:
    """The file that was packed, byte for byte."""
    head, _, rest = packed.partition(b"\n")
    about, parts = json.loads(head), []
    for width, length in about["sections"]:
        part = bytearray(length)
        for place in range(width):
            stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=DECODER)
            part[place::width] = stream.decompress(rest)
            rest = stream.unused_data
        parts.append(part)
    content = b"".join(parts)
    if rest or hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError("a packed file is damaged: its content is not what was packed")
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a file at once, as other processes may do at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)


def _files(folder: Path) -> Iterator[Path]:
    """Files of a folder, without those that begin with a dot, and `DATA` among them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def refresh() -> None:
    """Bring `DATA` up to date with `SOURCE`."""
    wanted = set()
    for path in _files(SOURCE):
        content, place = path.read_bytes(), DATA / path.relative_to(SOURCE)
        packed = path.suffix == SUFFIX
        if packed:
            place = place.with_suffix("")
            digest = json.loads(content.partition(b"\n")[0])["sha256"]
        else:
            digest = hashlib.sha256(content).hexdigest()
        if place in wanted:
            raise ValueError(f"{path} is there twice, packed and as it is")
        wanted.add(place)
        if not place.is_file() or hashlib.sha256(place.read_bytes()).hexdigest() != digest:
            _write(place, unpack(content) if packed else content)
    for path in set(_files(DATA)) - wanted:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        _write(file.with_name(file.name + SUFFIX), pack(file.name, file.read_bytes()))
        file.unlink()
refresh()
