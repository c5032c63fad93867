"""What is in a source of images: everything counted that a run would stumble over, and nothing left out."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rewardsr import progress
from rewardsr.data.images import read_pixels
from rewardsr.data.items import Item, by, sort_out
from rewardsr.data.layout import Found, find
from rewardsr.data.loader import default_workers
from rewardsr.data.rows import Stored
from rewardsr.data.sidecars import METADATA, SIDECAR, first_few, from_metadata, from_sidecars
from rewardsr.errors import UserError
from rewardsr.train.recipe import SourceRecipe


@dataclass(frozen=True)
class Survey:
    """What was found; images are named by their file, all of them, in file order.

    Attributes:
        place: that was looked at.
        kind: "HQ images", "pairs" or "LQ images".
        scale, crop: that it was looked at for.
        images: how many there are; of pairs those that are complete.
        sizes: "HxW" in pixels of targets that can be read: the smallest and the largest by area, and the median.
        usable: how many a run would use.
        too_small: images smaller than the crop.
        unreadable: what is wrong with each.
        may_be_unreadable: so many of them a run would leave out.
        duplicates: groups of images with equal pixels.
        no_partner: images of pairs that lack the other one.
        unfitting: pairs whose sizes do not fit the scale.
        captions: where texts were found: "sidecar", "metadata" or "none".
        captions_wanted: whether each image must have one.
        no_caption, empty_caption: images without a text, or with an empty one.
    """

    place: str
    kind: str
    scale: int
    crop: int
    images: int
    sizes: list[str]
    usable: int
    too_small: list[str]
    unreadable: list[str]
    may_be_unreadable: int
    duplicates: list[list[str]]
    no_partner: list[str]
    unfitting: list[str]
    captions: str
    captions_wanted: bool
    no_caption: list[str]
    empty_caption: list[str]

    @property
    def problems(self) -> list[str]:
        """Why a run would refuse it; nothing where it would not."""
        found = {
            f"{len(self.no_partner)} images have no partner": bool(self.no_partner),
            f"{len(self.unfitting)} pairs do not fit scale {self.scale}": bool(self.unfitting),
            f"{len(self.unreadable)} images are unreadable": len(self.unreadable) > self.may_be_unreadable,
            f"{len(self.no_caption)} images have no caption": self.captions_wanted and bool(self.no_caption),
            f"no image is usable for the crop of {self.crop}": not self.usable,
        }
        return [what for what, so in found.items() if so]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({**asdict(self), "problems": self.problems}, indent=2)

    def __str__(self) -> str:
        sizes = "{} to {}, median {}".format(*self.sizes) if self.sizes else ""
        copies = [" = ".join(group) for group in self.duplicates]
        rows: list[tuple[str, int | str, str]] = [
            ("images", self.images, f"{self.kind} in '{self.place}'"),
            ("sizes", "", sizes),
            ("too small", len(self.too_small), first_few(self.too_small) or f"for the crop of {self.crop}"),
            ("unreadable", len(self.unreadable), "; ".join(self.unreadable[:3])),
            ("duplicates", sum(len(group) - 1 for group in self.duplicates), first_few(copies)),
        ]
        if self.kind == "pairs":
            rows += [
                ("no partner", len(self.no_partner), first_few(self.no_partner)),
                ("other size", len(self.unfitting), "; ".join(self.unfitting[:3]) or f"than scale {self.scale} has"),
            ]
        rows += [("captions", self.captions if self.captions == "none" else self._captioned, self._about_captions())]
        rows += [("usable", self.usable, "")]
        return "\n".join(f"{name:<12}{count:>8}  {what}".rstrip() for name, count, what in rows)

    @property
    def _captioned(self) -> int:
        return self.images - len(self.no_caption) - len(self.empty_caption)

    def _about_captions(self) -> str:
        if self.captions == "none":
            return ""
        parts = [f"prompts: {self.captions}"]
        for what, names in (("missing", self.no_caption), ("empty", self.empty_caption)):
            parts += [f"{len(names)} {what} ({first_few(names)})"] if names else []
        return "; ".join(parts)


def survey(
    source: SourceRecipe,
    scale: int = 4,
    crop: int = 512,
    prompts: str | None = None,
    max_unreadable: float = 0.01,
    caption_column: str = "text",
) -> Survey:
    """Look at every image of a source and what belongs to it; all of them are decoded.

    Args:
        source: where they are.
        scale: HQ is this many times LQ.
        crop: side of the training crops in HQ pixels.
        prompts: "sidecar" or "metadata", which must then be there for each image; None: whatever texts there are.
        max_unreadable: share of the images that may be unreadable.
        caption_column: of the texts in metadata.jsonl or in a data set.

    Raises:
        UserError: as `rewardsr.data.layout.find`, a damaged metadata.jsonl, or other prompts.
    """
    if prompts not in (None, SIDECAR, METADATA):
        raise UserError(f"prompts '{prompts}': expected {SIDECAR} or {METADATA}, which lie beside images")
    found = find(source, scale)
    made = sort_out(found, scale, crop)
    damaged, same = _decoded(made.usable)
    captions, texts = _captions(found, prompts, caption_column)
    sizes = sorted(made.sizes, key=lambda size: (size[0] * size[1], size))
    return Survey(
        place=found.place,
        kind=found.kind,
        scale=scale,
        crop=crop,
        images=len(found.images),
        sizes=[by(sizes[place]) for place in (0, -1, (len(sizes) - 1) // 2)] if sizes else [],
        usable=len(made.usable) - len(damaged),
        too_small=made.small,
        unreadable=[*made.unreadable, *damaged],
        may_be_unreadable=int(max_unreadable * len(found.images)),
        duplicates=same,
        no_partner=list(found.alone),
        unfitting=made.unfitting,
        captions=captions,
        captions_wanted=prompts is not None,
        no_caption=[name for name, text in texts if text is None],
        empty_caption=[name for name, text in texts if text == ""],
    )


def _decoded(items: Sequence[Item]) -> tuple[list[str], list[list[str]]]:
    """What is wrong with each image that cannot be decoded, and groups of names of equal ones."""

    def look(item: Item) -> tuple[bytes | None, str]:
        """A hash of the image that it is named after, or what is wrong with one of its files."""
        try:
            pixels = read_pixels(item.shown).contiguous()
            if item.lq is not None and item.hq is not None:
                read_pixels(item.lq)
        except UserError as error:
            return None, str(error)
        return hashlib.blake2b(pixels.numpy().tobytes() + str(pixels.shape).encode()).digest(), ""

    by_content: dict[bytes, list[str]] = defaultdict(list)
    damaged = []
    pool = ThreadPoolExecutor(default_workers())
    try:
        with progress.bar("images", len(items)) as advance:
            for item, (content, wrong) in zip(items, pool.map(look, items), strict=True):
                if content is None:
                    damaged.append(wrong)
                else:
                    by_content[content].append(item.shown.name)
                advance()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C none of the others is waited for
    return damaged, [names for names in by_content.values() if len(names) > 1]


def _captions(found: Found, prompts: str | None, column: str) -> tuple[str, list[tuple[str, str | None]]]:
    """Where texts are, and name and text of each image."""
    shown: list[Stored] = [image for pair in found.images if (image := pair[0] or pair[1]) is not None]
    texts: Sequence[str | None]
    if found.table is not None:
        if prompts == SIDECAR:
            raise UserError(f"'{found.place}' is a data set, whose images have no files beside them: '{METADATA}'")
        if prompts is None and column not in found.table.columns:
            return "none", []
        texts = found.table.texts(column)
        return METADATA, list(zip((image.name for image in shown), texts, strict=True))
    paths = [image for image in shown if isinstance(image, Path)]
    for kind, look in ((SIDECAR, from_sidecars), (METADATA, partial(from_metadata, column=column))):
        texts = look(paths, found.root) if prompts in (None, kind) else []
        if any(text is not None for text in texts):
            return kind, list(zip((path.name for path in paths), texts, strict=True))
    return "none", [(path.name, None) for path in paths] if prompts else []
