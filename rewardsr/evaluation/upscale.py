"""Running a pipeline over tensors, files and PIL images."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.captions import Captions
from rewardsr.data.images import encode_png, from_pil, image_size, list_images, read_image, to_pil
from rewardsr.data.protocol import make_captions
from rewardsr.data.sidecars import (
    ADAPTER,
    METADATA,
    SIDECAR,
    check_tensors,
    first_few,
    resolve_prompts,
    stack_tensors,
    tensor_files,
    with_suffix,
)
from rewardsr.draws import Draws, Source
from rewardsr.errors import UserError, is_out_of_memory, printable
from rewardsr.evaluation.colour import _check_color_fix, fix_color
from rewardsr.evaluation.record import Record
from rewardsr.storage import check_folder, expand, remove_own_leftovers, write_bytes
from rewardsr.train.recipe import ProtocolRecipe

Input = Path | str | Image.Image | np.ndarray | Tensor

logger = logging.getLogger(__name__)


class Keywords(TypedDict, total=False):
    """The keywords of `upscale`, for its two forms."""

    color_fix: str
    seed: int
    protocol: ProtocolRecipe | None
    prompts: str | None
    overwrite: bool


@overload
def upscale(
    adapter: ISRAdapter, inputs: Input | Iterable[Input], output: Path | str, **options: Unpack[Keywords]
) -> list[Path]: ...


@overload
def upscale(
    adapter: ISRAdapter, inputs: Input | Iterable[Input], output: None = None, **options: Unpack[Keywords]
) -> list[Image.Image]: ...


def upscale(
    adapter: ISRAdapter,
    inputs: Input | Iterable[Input],
    output: Path | str | None = None,
    *,
    color_fix: str = "none",
    seed: int = 0,
    protocol: ProtocolRecipe | None = None,
    prompts: str | None = None,
    overwrite: bool = False,
) -> list[Path] | list[Image.Image]:
    """Super-resolve images, one at a time.

    All inputs are decoded once before any work, and nothing is written if one of them is bad. An input is never
    overwritten. Files are finished one by one: what is there after an interruption is whole, and the same call goes on
    from there. An image that fails later on (memory is short, its file is gone) is named in the end; all others are
    done.

    Args:
        adapter: the pipeline.
        inputs: an image file, a folder of them, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W) in [0, 1]
            or of uint8; or several of these.
        output: folder for `<stem>.png` (of what is no file `000.png`, the place in the list); made if need be. None:
            nothing is written.
        color_fix: "none", "adain" or "wavelet".
        seed: image i is sampled with noise from (seed, i).
        protocol: how images are prompted: `recipe.data` of a run; by default the adapter does.
        prompts: instead of the protocol's: "adapter", "sidecar" (`<stem>.txt` beside the image), "metadata" (the
            metadata.jsonl in its folder), "captioner" (the protocol's), or one text for all.
        overwrite: make results anew that are there already. Otherwise those of the same image, pipeline and settings
            are kept, and any others are refused.

    Returns:
        The files of all results, or without `output` PIL images of 8 bits, in the order of the inputs.

    Raises:
        UserError: no inputs, an unreadable one, two of one name, a result of other settings, an output that is an
            input; or some images have failed.
    """
    _check_color_fix(color_fix)
    sources = _sources(inputs)
    folder = None if output is None else expand(output)
    targets = None if folder is None else _targets(sources, folder)
    chosen = (protocol or ProtocolRecipe()).prompted(prompts)
    captions = make_captions(chosen)
    work = _Work(adapter, sources, *_beside(sources, chosen, adapter.extras), captions, seed, color_fix)
    if folder is None or targets is None:
        _refuse_unreadable(work)
        return [to_pil(work.result(index, work.batch(index))) for index in range(len(sources))]
    record = Record(folder, adapter, color_fix, str(seed))
    existing = [index for index, target in enumerate(targets) if target.exists() and not overwrite]
    keys = _refuse_unreadable(work, record, existing)
    others = [targets[index].name for index in existing if not record.holds(targets[index], keys[index])]
    if others:
        raise UserError(
            f"'{folder}' has {len(others)} of the results already ({first_few(others)}), of other settings or another "
            "program: choose another folder, or allow overwriting"
        )
    if existing:
        logger.info("%d of %d results are there already and are kept", len(existing), len(sources))
    remove_own_leftovers(folder)
    failed = []
    for index in sorted(set(range(len(sources))) - set(existing)):
        try:
            batch = work.batch(index)
            content = encode_png(work.result(index, batch))
        except _ImageError as error:
            failed.append(str(error))
            continue
        with record.noted(targets[index], record.source(batch), content):
            write_bytes(targets[index], content)
        logger.info("%d/%d %s", index + 1, len(sources), printable(str(targets[index])))
    if failed:
        raise UserError(f"{len(failed)} of {len(sources)} images have failed, the others are done: {_listed(failed)}")
    return targets


def find_files(inputs: Iterable[Path], output: Path, color_fix: str) -> list[Path]:
    """The image files that `upscale` gets, looked at before there is a pipeline: their names, headers and results.

    Raises:
        UserError: as `upscale`.
    """
    _check_color_fix(color_fix)
    files = [source for source in _sources(inputs) if isinstance(source, Path)]
    _targets(files, expand(output))
    for file in files:
        image_size(file)
    return files


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


class _ImageError(UserError):
    """Something is wrong with one image; others may do."""


@dataclass(frozen=True)
class _Work:
    """Images, what belongs to them, and how they are upscaled."""

    adapter: ISRAdapter
    sources: Sequence[Path | Image.Image | Tensor]
    texts: list[str] | None
    extras: list[Path] | None
    captions: Captions | None
    seed: int
    color_fix: str

    def batch(self, index: int) -> Batch:
        """Image `index`, decoded."""
        source = self.sources[index]
        try:
            lq = _read(source)
        except UserError as error:
            raise _ImageError(*error.args) from error
        except Exception as error:
            raise self._told(error, str(source)) from error
        texts = None if self.texts is None else (self.texts[index],)
        return Batch(
            lq=lq[None],
            prompts=texts if self.captions is None else self.captions(lq[None], keep=True),
            paths=(str(source),) if isinstance(source, Path) else (),
            extras=stack_tensors([] if self.extras is None else [self.extras[index]], self.adapter.extras),
        )

    def result(self, index: int, batch: Batch) -> Tensor:
        """`sr` of image `index`, (1, 3, H, W)."""
        noise = Draws(self.seed, 0, [index], "upscale")
        try:
            return upscale_tensor(self.adapter, batch, generator=noise, color_fix=self.color_fix)
        except Exception as error:
            what = batch.paths[0] if batch.paths else f"image {index}"
            raise self._told(error, f"{what}, {batch.lq.shape[-2]}x{batch.lq.shape[-1]}") from error

    def _told(self, error: Exception, what: str) -> Exception:
        """What lack of memory means for one image; any other error as it is."""
        if not is_out_of_memory(error):
            return error
        return _ImageError(f"out of memory at {what}: smaller images, a (smaller) tile, or bf16 need less")


def _refuse_unreadable(work: _Work, record: Record | None = None, wanted: Sequence[int] = ()) -> dict[int, str]:
    """Decode every image once; the record's hashes of those that are wanted."""
    keys, bad = {}, []
    needed = set(wanted)
    for index in range(len(work.sources)):
        try:
            batch = work.batch(index)
        except _ImageError as error:
            bad.append(str(error))
            continue
        if record is not None and index in needed:
            keys[index] = record.source(batch)
    if bad:
        raise UserError(bad[0] if len(bad) == 1 else f"{len(bad)} images cannot be read: {_listed(bad)}")
    return keys


def _listed(messages: Sequence[str]) -> str:
    return "; ".join(messages[:3]) + ("; ..." if len(messages) > 3 else "")


def _sources(inputs: Input | Iterable[Input]) -> list[Path | Image.Image | Tensor]:
    """One entry an image: files, PIL images, and tensors (3, H, W) in [0, 1]."""
    sources = list(_each(inputs))
    if not sources:
        raise UserError("no images to upscale")
    return sources


def _each(inputs: Input | Iterable[Input]) -> Iterator[Path | Image.Image | Tensor]:
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


def _read(source: Path | Image.Image | Tensor) -> Tensor:
    if isinstance(source, Tensor):
        return source
    return read_image(source) if isinstance(source, Path) else from_pil(source)


def _beside(
    sources: Sequence[Path | Image.Image | Tensor], protocol: ProtocolRecipe, names: Sequence[str]
) -> tuple[list[str] | None, list[Path] | None]:
    """Prompts and files of tensors, one an image each; None where there are none, or a captioner writes."""
    prompts = ADAPTER if protocol.captioner is not None else protocol.prompts
    files, extras = [source for source in sources if isinstance(source, Path)], None
    if len(files) == len(sources):
        extras = tensor_files(files, names)
        check_tensors(extras or [], names)
    elif prompts in (SIDECAR, METADATA):
        raise UserError(f"prompts '{prompts}' are files beside images, and a PIL image has none: give one text for all")
    else:
        files = [Path()] * len(sources)  # no file is looked for
    texts = resolve_prompts(files, prompts, column=protocol.caption_column)
    return None if texts is None else [with_suffix(text, protocol.prompt_suffix) for text in texts], extras


def _targets(sources: Sequence[Path | Image.Image | Tensor], output: Path) -> list[Path]:
    check_folder(output)
    names = [source.stem if isinstance(source, Path) else f"{place:03d}" for place, source in enumerate(sources)]
    targets = [expand(output / f"{name}.png") for name in names]
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
    return targets
