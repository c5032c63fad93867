"""How images lie on a disk: alone, as pairs in two folders, in a list of paths, in a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewardsr.data.images import list_images
from rewardsr.data.rows import Row, Stored, Table
from rewardsr.data.sidecars import HQ_FOLDERS, LQ_FOLDERS, first_few
from rewardsr.errors import UserError
from rewardsr.storage import expand, read_text
from rewardsr.train.recipe import SourceRecipe

ENLARGED = "sr_bicubic"  # SeeSR's training sets have LQ images enlarged to the size of HQ there
LONGEST_LIST = 2**28  # bytes: a million paths and more


@dataclass(frozen=True)
class Found:
    """The images of a source, before any of them is opened.

    Attributes:
        place: of the source, for messages.
        kind: "HQ images", "pairs" or "LQ images".
        images: (hq, lq) of each, in file order; None for the one that is not there.
        root: folder that may hold texts and tensors of the images; None where each lies beside its own.
        alone: images of pairs that have no partner, by their path below the root.
        table: where they are rows of one.
    """

    place: str
    kind: str
    images: Sequence[tuple[Stored | None, Stored | None]]
    root: Path | None = None
    alone: Sequence[str] = field(default_factory=list)
    table: Table | None = None


def find(source: SourceRecipe, scale: int) -> Found:
    """The images of a source.

    Args:
        source: where they are.
        scale: HQ is this many times LQ; tells which LQ images of a folder with several kinds are meant.

    Raises:
        UserError: there is no such place or no image in it, its layout is another, a list names missing files, or
            several images of a pair have one name.
    """
    kind = "LQ images" if source.layout == "lq" else "HQ images"
    if source.dataset is not None:
        table = Table(source)
        rows = [Row(table, number) for number in range(len(table))]
        return Found(source.place, kind, _alone(rows, kind), table=table)
    path = expand(source.place)
    if path.is_file() and path.suffix.lower() == ".txt":
        if source.layout == "pairs":
            raise UserError(f"'{path}' is a list of single images: layout hq or lq")
        return Found(source.place, kind, _alone(list(_listed(path)), kind))
    if not path.is_dir():
        what = ": it is a file, and a list of paths is called .txt" if path.exists() else ""
        raise UserError(f"no data folder '{path}'{what}")
    lq, hq = ([path / name for name in names if (path / name).is_dir()] for names in (LQ_FOLDERS, HQ_FOLDERS))
    there = [*lq, *hq]
    if source.layout == "pairs" or (source.layout == "auto" and lq and hq):
        lq_folder, hq_folder = _the_one(path, _of_scale(lq, scale), there), _the_one(path, hq, there)
        found, alone = _matched(lq_folder, hq_folder)
        return Found(source.place, "pairs", found, path, alone)
    if source.layout == "auto" and lq:
        kind = "LQ images"
    own = hq if kind == "HQ images" else _of_scale(lq, scale)
    inside = list_images(_the_one(path, own, there) if own else path, deep=True)
    return Found(source.place, kind, _alone(inside, kind), path)


def _alone(images: Sequence[Stored], kind: str) -> list[tuple[Stored | None, Stored | None]]:
    return [(image, None) if kind == "HQ images" else (None, image) for image in images]


def _listed(path: Path) -> Iterator[Path]:
    """The images that a list names, a path in each line, from the root or from the list's folder."""
    missing = []
    lines = [line.strip() for line in read_text(path, f"list '{path}'", LONGEST_LIST).split("\n")]
    images = [(number, path.parent / expand(line)) for number, line in enumerate(lines, 1) if line]
    for number, image in images:
        if image.is_file():
            yield image
        else:
            missing.append(f"line {number}: {image}")
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} files in the list '{path}' are missing ({first_few(missing)})"
        )
    if not images:
        raise UserError(f"the list '{path}' is empty: a path of an image in each line is expected")


def _of_scale(lq: Sequence[Path], scale: int) -> Sequence[Path]:
    """The LQ folders that fit the scale: with 1, images may be enlarged already."""
    fitting = [folder for folder in lq if (folder.name == ENLARGED) == (scale == 1)] or list(lq)
    if len(fitting) == 1 and fitting[0].name == ENLARGED and scale != 1:
        raise UserError(
            f"the LQ images in '{fitting[0]}' are enlarged to the size of HQ already, which fits scale 1, not {scale}: "
            "set the adapter's scale to 1, or give the images as they were in lq/"
        )
    return fitting


def _the_one(path: Path, fitting: Sequence[Path], there: Sequence[Path]) -> Path:
    if len(fitting) != 1:
        found = ", ".join(folder.name for folder in there) or "no such folders"
        raise UserError(f"'{path}' holds {found}: pairs are one of {_or(LQ_FOLDERS)} and one of {_or(HQ_FOLDERS)}")
    return fitting[0]


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"{name}/" for name in names)


def _matched(lq_folder: Path, hq_folder: Path) -> tuple[list[tuple[Stored | None, Stored | None]], list[str]]:
    """(hq, lq) files of equal names, extensions aside, in file order of the HQ images; and those without a partner.

    Raises:
        UserError: a folder has no images, or several of one name.
    """
    by_name: list[dict[Path, Path]] = []
    for folder in (hq_folder, lq_folder):
        paths = list_images(folder, deep=True)
        named = {path.relative_to(folder).with_suffix(""): path for path in paths}
        if len(named) != len(paths):
            twice = [path.name for path in paths if named[path.relative_to(folder).with_suffix("")] != path]
            raise UserError(f"'{folder}' has several images of one name with other extensions: {first_few(twice)}")
        by_name.append(named)
    hq, lq = by_name
    alone = [f"{hq_folder.name}/{path.relative_to(hq_folder)}" for name, path in hq.items() if name not in lq]
    alone += [f"{lq_folder.name}/{path.relative_to(lq_folder)}" for name, path in lq.items() if name not in hq]
    return [(path, lq[name]) for name, path in hq.items() if name in lq], alone
