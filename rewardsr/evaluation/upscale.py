"""Running a pipeline over tensors, files and PIL images."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from rewardsr import progress
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.captions import Captions
from rewardsr.data.images import image_size
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
from rewardsr.data.writing import Picture, check_format, check_size, encode, lost, to_array
from rewardsr.draws import Draws
from rewardsr.draws import Source as Noise
from rewardsr.errors import UserError, is_out_of_memory, printable
from rewardsr.evaluation.colour import _check_color_fix, fix_color_by_rows
from rewardsr.evaluation.inputs import Input, Source, read_source, sources_of, targets_of
from rewardsr.evaluation.record import Record
from rewardsr.storage import expand, remove_own_leftovers, write_bytes
from rewardsr.tiling import counted
from rewardsr.train.recipe import ProtocolRecipe

KEPT = 2**29  # bytes of images that stay in memory between the look at all of them and the work

logger = logging.getLogger(__name__)


class Keywords(TypedDict, total=False):
    """The keywords of `upscale`, for its two forms."""

    color_fix: str
    seed: int
    protocol: ProtocolRecipe | None
    prompts: str | None
    overwrite: bool
    skip_existing: bool
    format: str | None
    quality: int


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
    skip_existing: bool = False,
    format: str | None = None,
    quality: int = 95,
) -> list[Path] | list[Image.Image]:
    """Super-resolve images, one at a time.

    All inputs are decoded once before any work, and nothing is written if one of them is bad. An input is never
    overwritten. Files are finished one by one: what is there after an interruption is whole, and the same call goes on
    from there. An image that fails later on (memory is short, its file is gone) is named in the end; all others are
    done. Several processes may make the same call at a time: they share the images.

    Kept are transparency, which is enlarged beside the colours, EXIF, ICC profiles of RGB, the size on paper, and 16
    bits a channel, where the format has a place for them; a warning says what it has none for.

    Args:
        adapter: the pipeline.
        inputs: an image file, a folder of them, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W) in [0, 1]
            or of uint8; or several of these.
        output: folder for `<stem>.png` (of what is no file `000.png`, the place in the list); made if need be. For one
            image also a file, .png, .jpg, .webp or .tif. None: nothing is written.
        color_fix: "none", "adain" or "wavelet".
        seed: image i is sampled with noise from (seed, i).
        protocol: how images are prompted: `recipe.data` of a run; by default the adapter does.
        prompts: instead of the protocol's: "adapter", "sidecar" (`<stem>.txt` beside the image), "metadata" (the
            metadata.jsonl in its folder), "captioner" (the protocol's), or one text for all.
        overwrite: make results anew that are there already. Otherwise those of the same image, pipeline and settings
            are kept, and any others are refused.
        skip_existing: keep whatever is there under the name of a result, and ask not where it comes from.
        format: "png", "jpeg", "webp" or "tiff"; None: as the file `output` ends, PNG in a folder.
        quality: of JPEG and WebP, 1 to 100; WebP of 100 is lossless.

    Returns:
        The files of all results, or without `output` PIL images of 8 bits, in the order of the inputs.

    Raises:
        UserError: no inputs, an unreadable one, two of one name, a result of other settings, an output that is an
            input; or some images have failed.
    """
    _check_color_fix(color_fix)
    if overwrite and skip_existing:
        raise UserError("results that are there are either made anew (overwrite) or left (skip_existing): choose one")
    check_format(format or "png", quality)
    sources = sources_of(inputs)
    place = None if output is None else targets_of(sources, expand(output), format, quality)
    chosen = (protocol or ProtocolRecipe()).prompted(prompts)
    captions = make_captions(chosen)
    work = _Work(adapter, sources, *_beside(sources, chosen, adapter.extras), captions, seed, color_fix)
    if place is None:
        _refuse_unreadable(work)
        return [Image.fromarray(to_array(*work.made(index))) for index in range(len(sources))]
    folder, targets, name = place
    there = [index for index, target in enumerate(targets) if target.exists()]
    record = Record(folder, adapter, color_fix, str(seed), name, str(quality) if name in ("jpeg", "webp") else "")
    kept = [] if overwrite else there
    keys = _refuse_unreadable(work, name, record, [] if skip_existing else kept)
    _refuse_others(folder, [targets[index] for index in keys if not record.holds(targets[index], keys[index])])
    if kept:
        logger.info("%d of %d results are there already and are kept", len(kept), len(sources))
    remove_own_leftovers(folder)
    record.remove_claims()
    todo = sorted(set(range(len(sources))) - set(kept))
    failed: list[str] = []
    with progress.bar("upscale", total=len(todo)) as advance:
        # Other processes may do the same: what they are at is left to them, and looked at again in the end.
        share = partial(_share, work, targets, record, name, quality, failed, advance)
        for index in [index for index in todo if not share(index)]:
            share(index, wait=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(sources)} images have failed, the others are done: {_listed(failed)}")
    return targets


def _refuse_others(folder: Path, others: Sequence[Path]) -> None:
    if others:
        names = first_few([other.name for other in others])
        raise UserError(
            f"'{folder}' has {len(others)} of the results already ({names}), of other settings or another program: "
            "choose another folder, leave them (--skip-existing), or make them anew (--overwrite)"
        )


def _share(
    work: "_Work",
    targets: Sequence[Path],
    record: Record,
    name: str,
    quality: int,
    failed: list[str],
    advance: Callable[[], object],
    index: int,
    wait: bool = False,
) -> bool:
    """Make one result, unless another process has made it meanwhile; False where one is at it."""
    target = targets[index]
    with record.claimed(target, wait) as mine:
        if not mine:
            return False
        if not record.made_meanwhile(target):
            try:
                batch, picture = work.read(index)
                content = encode(work.result(index, batch)[0], picture, work.adapter.scale, name, quality)
            except _ImageError as error:
                failed.append(str(error))
            else:
                with record.noted(target, record.source(batch, picture), content):
                    write_bytes(target, content)
                logger.info("%d/%d %s", index + 1, len(work.sources), printable(str(target)))
        advance()
    return True


def find_files(
    inputs: Iterable[Path], output: Path, color_fix: str, format: str | None = None, quality: int = 95
) -> list[Path]:
    """The image files that `upscale` gets, looked at before there is a pipeline: their names, headers and results.

    Raises:
        UserError: as `upscale`.
    """
    _check_color_fix(color_fix)
    files = [source for source in sources_of(inputs) if isinstance(source, Path)]
    targets_of(files, expand(output), format, quality)
    for file in files:
        image_size(file)
    return files


@torch.no_grad()
def upscale_tensor(
    adapter: ISRAdapter,
    lq: Batch | Tensor,
    prompts: Sequence[str] | None = None,
    generator: Noise | None = None,
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
    if color_fix != "none":
        near, width = image.to(sr.device), slice(0, sr.shape[-1])
        fix_color_by_rows(sr, lambda rows: adapter.upsample_part(near, rows, width), sr.shape[-2], color_fix)
    return sr


class _ImageError(UserError):
    """Something is wrong with one image; others may do."""


@dataclass(frozen=True)
class _Work:
    """Images, what belongs to them, and how they are upscaled."""

    adapter: ISRAdapter
    sources: Sequence[Source]
    texts: list[str] | None
    extras: list[Path] | None
    captions: Captions | None
    seed: int
    color_fix: str
    kept: dict[int, Picture] = field(default_factory=dict)

    def read(self, index: int) -> tuple[Batch, Picture]:
        """Image `index`, decoded, and what came along with it."""
        source = self.sources[index]
        try:
            picture = self.kept.pop(index, None) or read_source(source)
        except UserError as error:
            raise _ImageError(*error.args) from error
        except Exception as error:
            raise self._told(error, str(source)) from error
        lq = picture.colours[None]
        texts = None if self.texts is None else (self.texts[index],)
        batch = Batch(
            lq=lq,
            prompts=texts if self.captions is None else self.captions(lq, keep=True),
            paths=(str(source),) if isinstance(source, Path) else (),
            extras=stack_tensors([] if self.extras is None else [self.extras[index]], self.adapter.extras),
        )
        return batch, picture

    def keep(self, index: int, picture: Picture) -> None:
        """Read it no second time, as long as all that is kept is little."""
        if sum(one.colours.nbytes for one in self.kept.values()) + picture.colours.nbytes <= KEPT:
            self.kept[index] = picture

    def made(self, index: int) -> tuple[Tensor, Picture]:
        """`sr` (3, H, W) of image `index`, and what it was made from."""
        batch, picture = self.read(index)
        return self.result(index, batch)[0], picture

    def result(self, index: int, batch: Batch) -> Tensor:
        """`sr` of image `index`, (1, 3, H, W)."""
        noise = Draws(self.seed, 0, [index], "upscale")
        calls = self.adapter.calls(*batch.lq.shape[-2:])
        tiled = calls > 2 + len(self.adapter.steps)
        try:
            bar = progress.bar("tiles", total=calls) if tiled else nullcontext(lambda n=1: None)
            with bar as advance, counted(advance):
                return upscale_tensor(self.adapter, batch, generator=noise, color_fix=self.color_fix)
        except Exception as error:
            what = batch.paths[0] if batch.paths else f"image {index}"
            raise self._told(error, f"{what}, {batch.lq.shape[-2]}x{batch.lq.shape[-1]}") from error

    def _told(self, error: Exception, what: str) -> Exception:
        """What lack of memory means for one image; any other error as it is."""
        if not is_out_of_memory(error):
            return error
        return _ImageError(f"out of memory at {what}: smaller images, a (smaller) tile, or bf16 need less")


def _refuse_unreadable(
    work: _Work, name: str = "png", record: Record | None = None, wanted: Sequence[int] = ()
) -> dict[int, str]:
    """Decode every image, and keep what little memory takes; the record's hashes of those that are wanted."""
    keys: dict[int, str] = {}
    bad: list[str] = []
    less: dict[str, list[str]] = {}

    def look(index: int) -> None:
        batch, picture = work.read(index)
        size = tuple(side * work.adapter.scale for side in batch.lq.shape[-2:])
        check_size(name, (size[0], size[1]), _called(work.sources[index], index))
        for what in lost(picture, name):
            less.setdefault(what, []).append(_called(work.sources[index], index))
        if record is not None and index in wanted:
            keys[index] = record.source(batch, picture)
        else:
            work.keep(index, picture)

    for index in range(len(work.sources)):
        try:
            look(index)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(bad[0] if len(bad) == 1 else f"{len(bad)} images cannot be read: {_listed(bad)}")
    for what, names in less.items():
        logger.warning("%s does not hold %s of %d images (%s)", name, what, len(names), first_few(names))
    return keys


def _called(source: Source, place: int) -> str:
    return str(source) if isinstance(source, Path) else f"image {place}"


def _listed(messages: Sequence[str]) -> str:
    return "; ".join(messages[:3]) + ("; ..." if len(messages) > 3 else "")


def _beside(
    sources: Sequence[Source], protocol: ProtocolRecipe, names: Sequence[str]
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
