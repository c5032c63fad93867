"""Tensors that lie beside images: `0001.safetensors` for `0001.png`, with what a pipeline family needs besides.

They belong to the whole image: crops and mirrored images get those of the image that they were cut from.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.data.captions import first_few
from rewardsr.errors import UserError
from rewardsr.weights import read_safetensors

FOLDER = "extras"


def resolve_extras(images: Sequence[Path], names: Sequence[str], root: Path | None = None) -> list[Path] | None:
    """The files of tensors that belong to images, one each.

    Args:
        images: the image files.
        names: of the tensors that an adapter takes; none: nothing is looked for.
        root: data folder, whose `extras/` is looked into first; by default the images' own folder.

    Returns:
        The files, or None if there is not a single one: the adapter says whether it can do without.

    Raises:
        UserError: some images have a file and others have none.
    """
    if not names or not images:
        return None
    paths = [_file_of(path, path.parent if root is None else root) for path in images]
    missing = [path.name for path, file in zip(images, paths, strict=True) if file is None]
    if len(missing) == len(paths):
        return None
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} images have no file of tensors beside them or in {FOLDER}/ "
            f"({first_few(missing)}), but others have: add them, or remove all"
        )
    return [path for path in paths if path is not None]


def _file_of(image: Path, root: Path) -> Path | None:
    name = f"{image.stem}.safetensors"
    return next((path for path in (root / FOLDER / name, image.parent / name) if path.is_file()), None)


def read_extras(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
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


def stack_extras(files: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of a batch of images, by name, (B, ...); nothing where there are no files.

    Raises:
        UserError: a file is damaged, or the shapes differ.
    """
    rows = list(_alike(files, names))
    return {name: torch.stack([row[name] for row in rows]) for name in names} if rows else {}


def check_extras(files: Sequence[Path], names: Sequence[str]) -> None:
    """Read every file once.

    Raises:
        UserError: as `stack_extras`.
    """
    for _ in _alike(files, names):
        pass


def _alike(files: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    shapes: dict[str, torch.Size] = {}
    for path in files:
        row = read_extras(path, names)
        for name, tensor in row.items():
            if shapes.setdefault(name, tensor.shape) != tensor.shape:
                raise UserError(
                    f"'{path}': tensor '{name}' is {tuple(tensor.shape)}, in '{files[0]}' it is "
                    f"{tuple(shapes[name])}: images of a batch need equal shapes"
                )
        yield row
