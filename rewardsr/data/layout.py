"""The two layouts of a data folder: HQ images alone, or pairs in two folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewardsr.data.images import image_size, list_images
from rewardsr.data.sidecars import first_few
from rewardsr.errors import UserError

LQ_FOLDERS = ("lq", "lr")
HQ_FOLDERS = ("gt", "hq")


@dataclass(frozen=True)
class Item:
    """One image of a data set: its files and what the headers and text files say.

    Attributes:
        hq: the target.
        lq: the input; None where it is made by degradation.
        size: height and width of the target in pixels.
        prompt: its text; None leaves it to the adapter.
        extras: file of tensors that belong to it, if there is one.
    """

    hq: Path
    lq: Path | None
    size: tuple[int, int]
    prompt: str | None
    extras: Path | None = None


def paired_folders(path: Path) -> tuple[Path, Path] | None:
    """(lq, hq) folders, or None for a folder of HQ images.

    Raises:
        UserError: there is no such folder, or it holds half of the two, or too many.
    """
    if not path.is_dir():
        raise UserError(f"no data folder '{path}'" + (": it is a file" if path.exists() else ""))
    lq, hq = ([path / name for name in names if (path / name).is_dir()] for names in (LQ_FOLDERS, HQ_FOLDERS))
    if not lq and not hq:
        return None
    if len(lq) != 1 or len(hq) != 1:
        found = ", ".join(folder.name for folder in lq + hq)
        raise UserError(f"'{path}' holds {found}: pairs are one of {_or(LQ_FOLDERS)} and one of {_or(HQ_FOLDERS)}")
    return lq[0], hq[0]


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"{name}/" for name in names)


def match(lq_folder: Path, hq_folder: Path) -> list[tuple[Path, Path]]:
    """(hq, lq) files with equal stems, in file order of the HQ images.

    Raises:
        UserError: a folder has no images or several of one name, or images have no partner.
    """
    by_stem: list[dict[str, Path]] = []
    for folder in (hq_folder, lq_folder):
        paths = list_images(folder)
        stems = {path.stem: path for path in paths}
        if len(stems) != len(paths):
            twice = [path.name for path in paths if stems[path.stem] != path]
            raise UserError(f"'{folder}' has several images of one name with other extensions: {first_few(twice)}")
        by_stem.append(stems)
    hq, lq = by_stem
    alone = [f"{hq_folder.name}/{hq[stem].name}" for stem in hq if stem not in lq]
    alone += [f"{lq_folder.name}/{lq[stem].name}" for stem in lq if stem not in hq]
    if alone:
        raise UserError(
            f"{len(alone)} images in '{hq_folder.parent}' have no partner of the same name: {first_few(alone)}"
        )
    return [(hq[stem], lq[stem]) for stem in hq]


def check_sizes(items: Sequence[Item], scale: int, crop: int | None) -> None:
    """Refuse pairs that do not fit the scale, and images smaller than a crop or the scale.

    Raises:
        UserError: there are some; the first few are named.
    """
    unequal = []
    for item in items:
        if item.lq is not None:
            height, width = image_size(item.lq)
            if (height * scale, width * scale) != item.size:
                unequal.append(f"{item.hq.name} is {_by(item.size)} for an LQ image of {_by((height, width))}")
    if unequal:
        raise UserError(
            f"{len(unequal)} of {len(items)} pairs do not fit scale {scale} (height x width): {'; '.join(unequal[:3])}"
        )
    least = crop or scale
    small = [f"{item.hq.name} ({_by(item.size)})" for item in items if min(item.size) < least]
    if small:
        what = f"the crop of {crop}: lower the crop or remove them" if crop else f"the scale {scale}: remove them"
        raise UserError(f"{len(small)} of {len(items)} images are smaller than {what} ({first_few(small)})")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
