"""What lies beside images: prompts (`0001.txt` for `0001.png`, or metadata.jsonl) and tensors (`0001.safetensors`).

Files are looked for in a folder of their own first, then beside the image. They belong to the whole image: crops and
mirrored images get those of the image that they were cut from.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rewardsr.errors import UserError
from rewardsr.storage import read_text
from rewardsr.weights import read_safetensors

PROMPT_FOLDERS = ("prompts", "prompt", "tag", "tags")  # `tag` is what SeeSR's training sets call it
TENSOR_FOLDERS = ("extras",)
LQ_FOLDERS, HQ_FOLDERS = ("lq", "lr", "sr_bicubic"), ("gt", "hq")  # of the images themselves, in a data folder
IMAGE_FOLDERS = LQ_FOLDERS + HQ_FOLDERS
BESIDE = "beside them or in a folder of its own"

T = TypeVar("T")
ADAPTER = "adapter"
SIDECAR = "sidecar"
METADATA = "metadata"
METADATA_FILE = (
    "metadata.jsonl"  # as Hugging Face's ImageFolder has it: a line {"file_name": ..., "text": ...} an image
)
LONGEST_METADATA = 2**30  # bytes
LONGEST = 100_000  # bytes of a prompt file: text encoders read some hundred
CAPTIONER = "captioner"  # see rewardsr.data.captions


def resolve_prompts(
    images: Sequence[Path], prompts: str, root: Path | None = None, column: str = "text"
) -> list[str] | None:
    """The prompts of a list of images.

    Args:
        images: the image files.
        prompts: "adapter" leaves the text to the adapter; "sidecar" reads the text files; "metadata" reads
            metadata.jsonl; anything else is the one prompt of all images.
        root: data folder that holds `prompts/` or `tag/`, and metadata.jsonl there or in the folders below; by default
            each image's own folder.
        column: the key of the texts in metadata.jsonl.

    Returns:
        One line of text an image (an empty file is an empty prompt), or None where the adapter decides.

    Raises:
        UserError: texts are missing (the first few are named); a text file is not UTF-8, longer than 100,000 bytes or
            cannot be read; metadata.jsonl is damaged; or "captioner".
    """
    if prompts == ADAPTER:
        return None
    if prompts == CAPTIONER:
        raise UserError(f"prompts '{CAPTIONER}' needs a captioner: set data.captioner in the recipe")
    if prompts == METADATA:
        what = f"line in a {METADATA_FILE} in their folder or above it in the data folder"
        advice = "their file_name is relative to that file"
        return _all(images, from_metadata(images, root, column), what, advice)
    if prompts != SIDECAR:
        return [prompts] * len(images)
    advice = f"write <name>.txt, or choose prompts '{ADAPTER}' or a fixed text"
    files = _find(images, ".txt", PROMPT_FOLDERS, root)
    return [_text(path) for path in _all(images, files, f"prompt file {BESIDE}", advice)]


def from_sidecars(images: Sequence[Path], root: Path | None = None) -> list[str | None]:
    """The text beside each image, None where there is none; arguments and errors are those of `resolve_prompts`."""
    return [None if path is None else _text(path) for path in _find(images, ".txt", PROMPT_FOLDERS, root)]


def from_metadata(images: Sequence[Path], root: Path | None = None, column: str = "text") -> list[str | None]:
    """The same of metadata.jsonl."""
    tables: dict[Path, dict[str, str]] = {}
    texts: list[str | None] = []
    for image in images:
        text = None
        for folder in (image.parent, *image.parent.parents):
            if folder not in tables:
                tables[folder] = _read_metadata(folder / METADATA_FILE, column)
            text = tables[folder].get(image.relative_to(folder).as_posix())
            if text is not None or folder == (root or image.parent):
                break
        texts.append(text)
    return texts


def with_suffix(text: str, suffix: str) -> str:
    """A prompt and what follows it after a comma; either may be empty."""
    return ", ".join(filter(None, (text, suffix)))


def tensor_files(images: Sequence[Path], names: Sequence[str], root: Path | None = None) -> list[Path] | None:
    """The files of tensors that belong to images, one each.

    Args:
        images: the image files.
        names: of the tensors that an adapter takes; none: nothing is looked for.
        root: data folder that holds `extras/`; by default each image's own folder.

    Returns:
        The files, or None if there is not a single one: the adapter says whether it can do without.

    Raises:
        UserError: some images have a file and others have none; the first few are named.
    """
    found = _find(images, ".safetensors", TENSOR_FOLDERS, root) if names else []
    if not any(found):
        return None
    return _all(images, found, f"file of tensors {BESIDE}", "add them, or remove those of all images")


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of a file, float32.

    Raises:
        UserError: it is damaged, lacks one of them, or holds values that are not finite.
    """
    tensors, _ = read_safetensors(path)
    found = {}
    for name in names:
        if name not in tensors:
            raise UserError(f"'{path}' holds no tensor '{name}', only {first_few(sorted(tensors)) or 'nothing'}")
        found[name] = tensors[name].float()
        if not found[name].isfinite().all():
            raise UserError(f"'{path}': tensor '{name}' holds values that are not finite")
    return found


def stack_tensors(files: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of a batch of images, by name, (B, ...); nothing where there are no files.

    Raises:
        UserError: a file is damaged, or the shapes differ.
    """
    rows = list(_rows(files, names))
    return {name: torch.stack([row[name] for row in rows]) for name in names} if rows else {}


def check_tensors(files: Sequence[Path], names: Sequence[str]) -> None:
    """Read every file once, one at a time.

    Raises:
        UserError: as `stack_tensors`.
    """
    for _ in _rows(files, names):
        pass


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names, for a message of one line."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _find(images: Sequence[Path], suffix: str, folders: Sequence[str], root: Path | None) -> list[Path | None]:
    """The file of each image, None where there is none."""
    found = []
    for image in images:
        name = Path(f"{image.stem}{suffix}")
        if root is not None and image.is_relative_to(root):
            # gt/a/1.png of pairs has its text in prompts/a/1.txt
            inside = image.parent.relative_to(root)
            own = root / inside.parts[0] if inside.parts and inside.parts[0] in IMAGE_FOLDERS else root
            name = image.parent.relative_to(own) / name
        places = [*((root or image.parent) / folder / name for folder in folders), image.parent / name.name]
        found.append(next((path for path in places if os.path.isfile(path)), None))
    return found


def _read_metadata(path: Path, column: str) -> dict[str, str]:
    """The texts by file name; nothing where there is no file."""
    if not path.is_file():
        return {}
    found = {}
    lines = read_text(path, f"'{path}'", LONGEST_METADATA).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: one object a line is expected") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{where}: expected an object with file_name")
        if column not in entry:
            raise UserError(f"{where} has no '{column}' ({first_few(sorted(entry))}): set data.caption_column")
        text = entry[column]
        if not isinstance(text, str | None) or len(text or "") > LONGEST:
            raise UserError(f"{where}: '{column}' is no text, or longer than {LONGEST:,} characters")
        found[entry["file_name"]] = " ".join((text or "").split())
    return found


def _all(images: Sequence[Path], found: Sequence[T | None], what: str, advice: str) -> list[T]:
    missing = [image.name for image, one in zip(images, found, strict=True) if one is None]
    if missing:
        raise UserError(f"{len(missing)} of {len(images)} images have no {what} ({first_few(missing)}): {advice}")
    return [one for one in found if one is not None]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise UserError(f"'{path}' is longer than {LONGEST:,} bytes, which is no prompt: shorten it")
        return " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{path}': it is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error


def _rows(files: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    shapes: dict[str, torch.Size] = {}
    for path in files:
        row = read_tensors(path, names)
        for name, tensor in row.items():
            if shapes.setdefault(name, tensor.shape) != tensor.shape:
                raise UserError(
                    f"'{path}': tensor '{name}' is {tuple(tensor.shape)}, in '{files[0]}' it is "
                    f"{tuple(shapes[name])}: images of a batch need equal shapes"
                )
        yield row
