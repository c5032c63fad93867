"""What lies beside images: prompts (`0001.txt` for `0001.png`) and tensors (`0001.safetensors`).

Both are looked for in a folder of their own first, then beside the image. They belong to the whole image: crops and
mirrored images get those of the image that they were cut from.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.errors import UserError
from rewardsr.weights import read_safetensors

PROMPT_FOLDERS = ("prompts", "prompt", "tag", "tags")  # `tag` is what SeeSR's training sets call it
TENSOR_FOLDERS = ("extras",)
ADAPTER = "adapter"
SIDECAR = "sidecar"
LONGEST = 100_000  # bytes of a prompt file: text encoders read some hundred
CAPTIONER = "captioner"  # see rewardsr.data.captions


def resolve_prompts(images: Sequence[Path], prompts: str, root: Path | None = None) -> list[str] | None:
    """The prompts of a list of images.

    Args:
        images: the image files.
        prompts: "adapter" leaves the text to the adapter; "sidecar" reads the text files; anything else is the one
            prompt of all images.
        root: data folder that holds `prompts/` or `tag/`; by default each image's own folder.

    Returns:
        One line of text an image (an empty file is an empty prompt), or None where the adapter decides.

    Raises:
        UserError: a text file is missing (the first few are named), is not UTF-8, longer than
            100,000 bytes or cannot be read; or "captioner".
    """
    if prompts == ADAPTER:
        return None
    if prompts == CAPTIONER:
        raise UserError(f"prompts '{CAPTIONER}' needs a captioner: set data.captioner in the recipe")
    if prompts != SIDECAR:
        return [prompts] * len(images)
    advice = f"write <name>.txt, or choose prompts '{ADAPTER}' or a fixed text"
    return [_text(path) for path in _all(images, _find(images, ".txt", PROMPT_FOLDERS, root), "prompt file", advice)]


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
    return _all(images, found, "file of tensors", "add them, or remove those of all images")


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
        places = [*((root or image.parent) / folder for folder in folders), image.parent]
        files = (place / f"{image.stem}{suffix}" for place in places)
        found.append(next((path for path in files if os.path.isfile(path)), None))
    return found


def _all(images: Sequence[Path], found: Sequence[Path | None], what: str, advice: str) -> list[Path]:
    missing = [image.name for image, path in zip(images, found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} images have no {what} beside them or in a folder of its own "
            f"({first_few(missing)}): {advice}"
        )
    return [path for path in found if path is not None]


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
