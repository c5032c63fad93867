"""Whatever stands in an image file or beside it: an image, a text, or one line that says what is wrong."""

import io
import warnings
from itertools import product
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from _files import XMP, chunk, declared, exif_of, marks, png
from hypothesis import given, settings
from PIL import Image

from rewardsr.data.images import from_pil, image_size, read_image
from rewardsr.data.sidecars import resolve_prompts
from rewardsr.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of PIL, where the test itself opens a file

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
OPTIONS = (
    {},
    {"exif": exif_of(6)},
    {"compression": "tiff_lzw"},
    {"lossless": True, "xmp": XMP % 8},
    {"save_all": True},
)


def _image(mode: str) -> Image.Image:
    random = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (5, 7)).astype(np.uint16))
    plain = Image.fromarray(random.integers(0, 256, (5, 7, 4), dtype=np.uint8))
    if mode in ("LAB", "YCbCr", "HSV", "CMYK"):
        return Image.merge(mode, plain.split()[: 4 if mode == "CMYK" else 3])
    return plain.convert("RGB").convert(mode) if mode in ("1", "P", "I", "F") else plain.convert(mode)


def _written() -> list[bytes]:
    """A small image of every mode in every format that PIL writes, and PNGs that it does not write."""
    Image.init()
    files = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, mode, options in product(sorted(Image.SAVE), MODES, OPTIONS):
            buffer = io.BytesIO()
            try:
                _image(mode).save(buffer, kind, **options)
            except Exception:  # most formats take few modes
                continue
            files.append(buffer.getvalue())
    samples = np.random.default_rng(0).integers(0, 65536, (4, 6, 4))
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        files += [png(samples[..., :channels], 16, colour, b"", mark) for mark in (b"", *marks(8).values())]
    files.append(png(samples[..., :1] % 4, 2, 3, chunk(b"PLTE", bytes(range(12))) + chunk(b"tRNS", b"\0\x80")))
    return [*dict.fromkeys(files), declared(9000, 9000)]


FILES = _written()


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A file, whole, cut off, with bytes changed, with another's tail, or of bytes at random."""
    content = bytearray(draw(st.sampled_from(FILES)))
    kind = draw(st.sampled_from(["whole", "cut", "changed", "changed", "spliced", "random", "headed"]))
    if kind == "cut":
        del content[draw(st.integers(0, len(content))) :]
    elif kind == "changed":
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, min(len(content), draw(st.sampled_from([64, 10_000]))) - 1))
            content[place] = draw(st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255)))
    elif kind == "spliced":
        other = draw(st.sampled_from(FILES))
        content[draw(st.integers(0, len(content))) :] = other[draw(st.integers(0, len(other))) :]
    elif kind == "random":
        content[:] = draw(st.binary(max_size=64))
    elif kind == "headed":
        content[draw(st.integers(0, 32)) :] = draw(st.binary(max_size=64))
    return bytes(content)


def outcome(call):
    """What a call gives, or the line that says why not."""
    try:
        return call()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return str(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.bin"


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250_000)  # so that an example takes milliseconds


def check(path: Path, content: bytes) -> bool:
    """Whether the image can be read; reader and header agree on its size."""
    path.write_bytes(content)
    image, size = outcome(lambda: read_image(path)), outcome(lambda: image_size(path))
    if isinstance(image, str):
        return False
    assert image.dtype == torch.float32 and image.is_contiguous() and image.shape[0] == 3
    assert float(image.min()) >= 0 and float(image.max()) <= 1
    assert size == tuple(image.shape[-2:])
    return True


def test_every_file_as_it_was_written(place) -> None:
    assert len(FILES) > 150 and sum(check(place, content) for content in FILES) > 0.75 * len(FILES)


@given(contents())
@settings(max_examples=1500)
def test_image_files(place, content) -> None:
    check(place, content)
    with io.BytesIO(content) as file:
        try:
            image = Image.open(file)
        except Exception:  # no image for PIL: none to hand over
            return
        outcome(lambda: from_pil(image))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass"))))
@settings(max_examples=300)
def test_prompt_files(place, content) -> None:
    place.with_suffix(".txt").write_bytes(content)
    found = outcome(lambda: resolve_prompts([place], "sidecar"))
    if isinstance(found, list):
        assert found == [" ".join(found[0].split())]
