"""What `upscale` is given, and where its results go."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardsr.data.images import list_images
from rewardsr.data.writing import FORMATS, Picture, check_format, format_of, read_picture
from rewardsr.errors import UserError
from rewardsr.storage import check_folder, expand

Input = Path | str | Image.Image | np.ndarray | Tensor
Source = Path | Image.Image | Tensor


def sources_of(inputs: Input | Iterable[Input]) -> list[Source]:
    """One entry an image: files, PIL images, and tensors (3, H, W) in [0, 1]."""
    sources = list(_each(inputs))
    if not sources:
        raise UserError("no images to upscale")
    return sources


def _each(inputs: Input | Iterable[Input]) -> Iterator[Source]:
    if isinstance(inputs, str | os.PathLike | Image.Image | np.ndarray | Tensor) or not isinstance(inputs, Iterable):
        inputs = [inputs]
    for entry in inputs:
        if isinstance(entry, str | os.PathLike):
            path = expand(os.fspath(entry))
            yield from list_images(path) if path.is_dir() else [path]
        elif isinstance(entry, Image.Image):
            yield entry
        elif isinstance(entry, np.ndarray) and _is_picture(entry):
            yield Image.fromarray(entry)
        elif isinstance(entry, Tensor) and entry.ndim in (3, 4) and entry.shape[-3] == 3 and entry.numel():
            whole = entry.detach().cpu()
            whole = whole.float() / 255 if whole.dtype == torch.uint8 else whole.float()
            if not bool(((whole >= 0) & (whole <= 1)).all()):
                raise UserError(
                    f"a tensor to upscale has values of {whole.min():.4g} to {whole.max():.4g}, expected [0, 1]"
                )
            yield from whole if whole.ndim == 4 else [whole]
        else:
            about = f" {entry.dtype} {tuple(entry.shape)}" if isinstance(entry, np.ndarray | Tensor) else ""
            raise UserError(
                f"cannot upscale {type(entry).__name__}{about}: give files, folders, PIL images, arrays (H, W, 3) of "
                "uint8, or tensors (3, H, W) in [0, 1]"
            )


def _is_picture(array: np.ndarray) -> bool:
    colours = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    return colours and array.dtype == np.uint8 and array.size > 0


def read_source(source: Source) -> Picture:
    """An image, decoded.

    Raises:
        UserError: as `read_image`.
    """
    return Picture(source) if isinstance(source, Tensor) else read_picture(source)


def targets_of(sources: Sequence[Source], output: Path, name: str | None, quality: int) -> tuple[Path, list[Path], str]:
    """Folder of the results, the file of each, and their format.

    Args:
        sources: the images.
        output: a folder; or of one image a file, by its extension.
        name: of the format; None: that of the file, PNG in a folder.
        quality: is checked along with it.

    Raises:
        UserError: two of one name, a folder or an input in the way, or a format that is not written.
    """
    meant = None if output.is_dir() else format_of(output)
    if meant is not None and len(sources) > 1:
        raise UserError(f"'{output}' is one file, and there are {len(sources)} images: give a folder, and --format")
    if meant is not None and name not in (None, meant):
        raise UserError(f"'{output}' ends as a {meant} file, and format {name} is asked for: leave out one of them")
    chosen = meant or name or "png"
    check_format(chosen, quality)
    if meant is not None:
        check_folder(output.parent)
        targets = [output]
    else:
        check_folder(output)
        names = [source.stem if isinstance(source, Path) else f"{place:03d}" for place, source in enumerate(sources)]
        targets = [expand(output / f"{name}{FORMATS[chosen]}") for name in names]
    _check_targets(sources, targets)
    return targets[0].parent, targets, chosen


def _check_targets(sources: Sequence[Source], targets: Sequence[Path]) -> None:
    # Folded, because many file systems take A.png and a.png for one file.
    seen: dict[str, int] = {}
    for place, target in enumerate(targets):
        other = seen.setdefault(target.name.casefold(), place)
        if other != place:
            one, two = (
                f"'{source}'" if isinstance(source, Path) else f"image {at}"
                for at, source in ((other, sources[other]), (place, sources[place]))
            )
            raise UserError(f"{one} and {two} would both become '{target}': rename one, or upscale them apart")
    for target in targets:
        if target.is_dir():
            raise UserError(f"'{target}' is a folder where a result would go: choose another output folder")
        if target.exists() and any(
            isinstance(source, Path) and source.exists() and target.samefile(source) for source in sources
        ):
            raise UserError(f"'{target}' is an input and would be overwritten: choose another output folder")
