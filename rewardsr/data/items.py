"""From what lies somewhere to what is used: sizes, texts and tensors of images; what cannot be used is left out."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewardsr import progress
from rewardsr.data.images import image_size
from rewardsr.data.layout import Found, find
from rewardsr.data.rows import Row, Stored
from rewardsr.data.sidecars import (
    ADAPTER,
    METADATA,
    SIDECAR,
    first_few,
    resolve_prompts,
    tensor_files,
    with_suffix,
)
from rewardsr.errors import UserError
from rewardsr.train.recipe import SourceRecipe

MANY_EMPTY = 0.2  # share of texts that are empty, from where that is no accident

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One image of a data set: its files and what the headers and text files say.

    Attributes:
        hq: the target; None where there is none.
        lq: the input; None where it is made by degradation.
        size: height and width of the target in pixels.
        prompt: its text; None leaves it to the adapter.
        extras: file of tensors that belong to it, if there is one.
        source: number of the source that it is of.
    """

    hq: Stored | None
    lq: Stored | None
    size: tuple[int, int]
    prompt: str | None = None
    extras: Path | None = None
    source: int = 0

    @property
    def shown(self) -> Stored:
        """The file that it is named after."""
        shown = self.hq or self.lq
        assert shown is not None
        return shown


@dataclass(frozen=True)
class Wanted:
    """What is asked of images; `rewardsr.data.folder.open_data` explains each field."""

    scale: int
    crop: int | None
    pad: bool
    max_unreadable: float
    degrades: bool
    prompts: str
    caption_column: str
    suffix: str
    extras: Sequence[str]

    @property
    def least(self) -> int:
        """Pixels that each side of a target has at least."""
        return self.scale if self.crop is None or self.pad else self.crop


@dataclass(frozen=True)
class Opened:
    """A source whose headers, texts and names have been checked.

    Attributes:
        items: its images.
        total: how many there are, usable or not.
        unreadable: how many have been left out because they cannot be read.
        said: how many images of what kind are where, in words.
    """

    items: list[Item]
    total: int
    unreadable: int
    said: str


@dataclass(frozen=True)
class Sorted:
    """The images of a source by whether they can be used.

    Attributes:
        usable: in file order, without texts and tensors.
        small: those smaller than is needed, as "name (HxW)".
        unreadable: what is wrong with each that cannot be read.
        unfitting: pairs whose sizes do not fit the scale, in words.
        sizes: of the targets of all but the unreadable ones, in pixels.
    """

    usable: list[Item]
    small: list[str]
    unreadable: list[str]
    unfitting: list[str]
    sizes: list[tuple[int, int]]


def open_source(source: SourceRecipe, number: int, wanted: Wanted) -> Opened:
    """The images of a source.

    Args:
        source: where they are.
        number: of the source.
        wanted: what is asked of them.

    Raises:
        UserError: as `find`, `texts_of` and `rewardsr.data.sidecars.tensor_files`; images lack their partner or do not
            fit it, too many cannot be read, or none can be used.
    """
    found = find(source, wanted.scale)
    if found.kind == "HQ images" and not wanted.degrades:
        raise UserError(f"'{found.place}' holds HQ images only: set a degradation, or give pairs in lq/ and gt/")
    made = sort_out(found, wanted.scale, wanted.least, number)
    items = _require(found, made, wanted)
    texts = texts_of(found, items, wanted.prompts, wanted.caption_column)
    if (empty := texts.count("")) > MANY_EMPTY * len(texts) and wanted.prompts in (SIDECAR, METADATA):
        logger.warning("'%s': %d of %d prompts are empty", found.place, empty, len(texts))
    files = _extras_of(found, items, wanted.extras)
    items = [
        replace(item, prompt=None if text is None else with_suffix(text, wanted.suffix), extras=file)
        for item, text, file in zip(items, texts, files, strict=True)
    ]
    return Opened(items, len(found.images), len(made.unreadable), f"{len(items)} {found.kind} in '{found.place}'")


def sort_out(found: Found, scale: int, least: int, number: int = 0) -> Sorted:
    """Read the headers of all images.

    Args:
        found: the images.
        scale: HQ is this many times LQ.
        least: pixels that each side of a target has at least.
        number: of the source.
    """
    made = Sorted([], [], [], [], [])
    with progress.bar("reading headers", len(found.images)) as advance:
        for hq, lq in found.images:
            try:
                own, low = (None if image is None else image_size(image) for image in (hq, lq))
            except UserError as error:
                made.unreadable.append(str(error))
                continue
            finally:
                advance()
            enlarged = None if low is None else (low[0] * scale, low[1] * scale)
            size = own or enlarged
            assert size is not None
            item = Item(hq, lq, size, source=number)
            made.sizes.append(size)
            if enlarged not in (None, size):
                assert low is not None
                made.unfitting.append(f"{item.shown.name} is {by(size)} for an LQ image of {by(low)}")
            elif min(size) < least:
                made.small.append(f"{item.shown.name} ({by(size)})")
            else:
                made.usable.append(item)
    return made


def by(size: tuple[int, int]) -> str:
    """Height and width in words."""
    return f"{size[0]}x{size[1]}"


def _require(found: Found, made: Sorted, wanted: Wanted) -> list[Item]:
    """The usable images of a source; says how many others are left out."""
    total = len(found.images)
    if found.alone:
        raise UserError(
            f"{len(found.alone)} images in '{found.place}' have no partner of the same name: {first_few(found.alone)}"
        )
    if made.unfitting:
        raise UserError(
            f"{len(made.unfitting)} of {total} pairs do not fit scale {wanted.scale} (height x width): "
            f"{'; '.join(made.unfitting[:3])}"
        )
    refuse_many(made.unreadable, total, int(wanted.max_unreadable * total))
    crop = None if wanted.pad else wanted.crop
    need = f"the crop of {crop}" if crop else f"the scale {wanted.scale}"
    if not made.usable and not made.small:
        raise UserError(f"'{found.place}' holds no image that can be read")
    if not made.usable:
        advice = "; lower data.crop, or set data.too_small to pad" if crop else ""
        raise UserError(f"no image in '{found.place}' is as large as {need}: {first_few(made.small)}{advice}")
    if made.small:
        logger.warning(
            "'%s': %d of %d images are smaller than %s and are left out: %s",
            *(found.place, len(made.small), total, need, first_few(made.small)),
        )
    return made.usable


def refuse_many(unreadable: Sequence[str], total: int, most: int) -> None:
    """Say that images cannot be used and are left out; or that they are too many.

    Args:
        unreadable: what is wrong with each.
        total: number of images.
        most: of them that may be unreadable.

    Raises:
        UserError: they are more than `most`.
    """
    if not unreadable:
        return
    what, those = f"{len(unreadable)} of {total} images are unreadable", "; ".join(_briefly(unreadable[:3]))
    if len(unreadable) > most:
        raise UserError(f"{what}, and data.max_unreadable allows {most}: {those}")
    logger.warning("%s and are left out: %s", what, those)


def _briefly(errors: Sequence[str]) -> Iterator[str]:
    """Messages of which the later ones leave out the folder that the first one names: a line holds few whole paths."""
    first = errors[0]
    folder = first[: first.rfind("/") + 1]
    yield first
    yield from (f"'{error[len(folder) :]}" if folder and error.startswith(folder) else error for error in errors[1:])


def texts_of(found: Found, items: Sequence[Item], prompts: str, column: str) -> Sequence[str | None]:
    """The text of each image, None where the adapter or a captioner decides.

    Args:
        found: the source.
        items: its images.
        prompts: see `rewardsr.data.sidecars.resolve_prompts`.
        column: of the texts in a table or in metadata.jsonl.

    Raises:
        UserError: as `resolve_prompts` and `Table.texts`; or sidecar texts are asked of a table.
    """
    if prompts == ADAPTER:
        return [None] * len(items)
    rows = [item.shown for item in items if isinstance(item.shown, Row)]
    if not rows:
        paths = [item.shown for item in items if isinstance(item.shown, Path)]
        texts = resolve_prompts(paths, prompts, found.root, column)
    elif prompts == METADATA:
        every = rows[0].table.texts(column)
        texts = [every[row.number] for row in rows]
    elif prompts == SIDECAR:
        raise UserError(f"'{found.place}' is a data set, whose images have no files beside them: prompts '{METADATA}'")
    else:
        texts = resolve_prompts([Path()] * len(items), prompts)
    assert texts is not None
    return texts


def _extras_of(found: Found, items: Sequence[Item], names: Sequence[str]) -> Sequence[Path | None]:
    """The file of tensors of each image, None where there are none."""
    paths = [item.shown for item in items if isinstance(item.shown, Path)]
    files = tensor_files(paths, names, found.root) if len(paths) == len(items) else None
    return files or [None] * len(items)


def centre(
    lengths: tuple[int, int], scale: int, side: int | None, step: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of an image that is validated and evaluated: corner and size, all in HQ pixels.

    Args:
        lengths: height and width of the image.
        scale: the size is a multiple of this.
        side: at most so many pixels a side; None: the whole image.
        step: the corner lies at multiples of this.
    """
    tall, wide = (min(length, side or length) // scale * scale for length in lengths)
    top, left = ((length - size) // 2 // step * step for length, size in zip(lengths, (tall, wide), strict=True))
    return (top, left), (tall, wide)
