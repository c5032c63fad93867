"""Running a pipeline over tensors, files and PIL images."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.images import from_pil, list_images, read_image, to_pil, write_image
from rewardsr.data.sidecars import (
    ADAPTER,
    SIDECAR,
    check_tensors,
    first_few,
    resolve_prompts,
    stack_tensors,
    tensor_files,
)
from rewardsr.draws import Draws, Source
from rewardsr.errors import UserError
from rewardsr.evaluation.colour import _check_color_fix, fix_color

Input = Path | str | Image.Image

logger = logging.getLogger(__name__)


class Keywords(TypedDict, total=False):
    """The keywords of `upscale`, for its two forms."""

    color_fix: str
    seed: int
    prompts: str
    overwrite: bool


@overload
def upscale(
    adapter: ISRAdapter, inputs: Input | Sequence[Input], output: Path | str, **options: Unpack[Keywords]
) -> list[Path]: ...


@overload
def upscale(
    adapter: ISRAdapter, inputs: Input | Sequence[Input], output: None = None, **options: Unpack[Keywords]
) -> list[Image.Image]: ...


def upscale(
    adapter: ISRAdapter,
    inputs: Input | Sequence[Input],
    output: Path | str | None = None,
    *,
    color_fix: str = "none",
    seed: int = 0,
    prompts: str = ADAPTER,
    overwrite: bool = False,
) -> list[Path] | list[Image.Image]:
    """Super-resolve images, one at a time.

    All inputs are decoded once before any work, and nothing is written if one of them is bad. An input is never
    overwritten. Files are finished one by one: what is there after an interruption is whole.

    Args:
        adapter: the pipeline.
        inputs: an image file, a folder of them, or a PIL image; or a list of these.
        output: folder for `<stem>.png` (of PIL images `000.png`, the place in the list); made if need be. None: nothing
            is written.
        color_fix: "none", "adain" or "wavelet".
        seed: image i is sampled with noise from (seed, i).
        prompts: "adapter", "sidecar" (`<stem>.txt` beside the image), or one text for all.
        overwrite: replace files of an earlier run.

    Returns:
        The files written, or without `output` PIL images of 8 bits, in the order of the inputs.

    Raises:
        UserError: no inputs, an unreadable one, two of one name, an output that exists already or is an input.
    """
    _check_color_fix(color_fix)
    sources: list[Path | Image.Image] = []
    for entry in [inputs] if isinstance(inputs, str | Path | Image.Image) else inputs:
        path = entry if isinstance(entry, Image.Image) else Path(entry)
        sources += list_images(path) if isinstance(path, Path) and path.is_dir() else [path]
    if not sources:
        raise UserError("no images to upscale")
    targets = None if output is None else _targets(sources, Path(output), overwrite)
    texts, extras = _beside(sources, prompts, adapter.extras)
    for source in sources:
        _read(source)
    pictures: list[Image.Image] = []
    for index, source in enumerate(sources):
        batch = Batch(
            lq=_read(source)[None],
            prompts=None if texts is None else (texts[index],),
            paths=(str(source),) if isinstance(source, Path) else (),
            extras=stack_tensors([] if extras is None else [extras[index]], adapter.extras),
        )
        sr = upscale_tensor(adapter, batch, generator=Draws(seed, 0, [index], "upscale"), color_fix=color_fix)
        if targets is None:
            pictures.append(to_pil(sr))
        else:
            write_image(sr, targets[index])
            logger.info("%d/%d %s", index + 1, len(sources), targets[index])
    return pictures if targets is None else targets


@torch.no_grad()
def upscale_tensor(
    adapter: ISRAdapter,
    lq: Batch | Tensor,
    prompts: Sequence[str] | None = None,
    generator: Source | None = None,
    color_fix: str = "none",
) -> Tensor:
    """Super-resolve images.

    Args:
        adapter: the pipeline.
        lq: (B, 3, h, w) float32 in [0, 1], or a Batch, which brings its own prompts and extras.
        prompts: one text an image; None leaves it to the adapter; only with a bare tensor.
        generator: source of the start noise; only a deterministic pipeline does without.
        color_fix: "none", "adain" or "wavelet", against the bicubic enlargement of `lq`.

    Returns:
        `sr` (B, 3, scale * h, scale * w) float32 in [0, 1], on the adapter's device.

    Raises:
        UserError: an unknown colour fix.
        ValueError: a tensor that breaks the contract.
    """
    _check_color_fix(color_fix)
    condition = adapter.encode(lq, prompts, generator if adapter.noisy_condition else None)
    sr = adapter.sample(condition, generator)
    image = lq.lq if isinstance(lq, Batch) else lq
    expected = (image.shape[0], 3, image.shape[2] * adapter.scale, image.shape[3] * adapter.scale)
    if tuple(sr.shape) != expected:
        raise ValueError(f"adapter '{adapter.name}' made {tuple(sr.shape)}, expected {expected}")
    if color_fix == "none":
        return sr
    return fix_color(sr, adapter.upsample(image.to(sr.device)), color_fix)


def _read(source: Path | Image.Image) -> Tensor:
    return read_image(source) if isinstance(source, Path) else from_pil(source)


def _beside(
    sources: Sequence[Path | Image.Image], prompts: str, names: Sequence[str]
) -> tuple[list[str] | None, list[Path] | None]:
    """Prompts and files of tensors, one an image each; None where there are none."""
    files = [source for source in sources if isinstance(source, Path)]
    if len(files) == len(sources):
        extras = tensor_files(files, names)
        check_tensors(extras or [], names)
        return resolve_prompts(files, prompts), extras
    if prompts == SIDECAR:
        raise UserError(f"prompts '{SIDECAR}' are files beside images, and a PIL image has none: give one text for all")
    return resolve_prompts([Path()] * len(sources), prompts), None  # no file is looked for


def _targets(sources: Sequence[Path | Image.Image], output: Path, overwrite: bool) -> list[Path]:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; give a folder")
    names = [source.stem if isinstance(source, Path) else f"{place:03d}" for place, source in enumerate(sources)]
    targets = [output / f"{name}.png" for name in names]
    # Folded, because many file systems take A.png and a.png for one file.
    seen: dict[str, Path | Image.Image] = {}
    for source, target in zip(sources, targets, strict=True):
        other = seen.setdefault(target.name.casefold(), source)
        if other is not source:
            raise UserError(f"'{other}' and '{source}' would both become '{target}': rename one, or upscale them apart")
    existing = [target for target in targets if target.exists()]
    for target in existing:
        if any(isinstance(source, Path) and source.exists() and target.samefile(source) for source in sources):
            raise UserError(f"'{target}' is an input and would be overwritten: choose another output folder")
    if existing and not overwrite:
        shown = first_few([path.name for path in existing])
        raise UserError(f"'{output}' has {len(existing)} of the results already ({shown}): allow overwriting")
    return targets
