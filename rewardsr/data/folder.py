"""Image folders to batches, without state.

Training reads an endless stream of samples: sample k belongs to epoch k // len(data) and stands at a place in a
permutation seeded by (seed, epoch); its crop, flip and degradation are seeded by (seed, k). So any process can make
any sample, a resumed run equals an uninterrupted one, and the size of a batch does not matter.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.data.captions import Captions
from rewardsr.data.degradation import Degradation
from rewardsr.data.identity import identity_of
from rewardsr.data.images import image_size, list_images, read_image, to_uint8
from rewardsr.data.sidecars import (
    ADAPTER,
    CAPTIONER,
    check_tensors,
    first_few,
    resolve_prompts,
    stack_tensors,
    tensor_files,
)
from rewardsr.draws import generator
from rewardsr.errors import UserError
from rewardsr.storage import expand

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


def open_data(
    path: Path | str,
    *,
    scale: int,
    crop: int | None = None,
    degradation: Degradation | None = None,
    prompts: str = ADAPTER,
    captions: Captions | None = None,
    extras: Sequence[str] = (),
    flips: bool = True,
    cache_mb: int = 512,
) -> "Data":
    """Open a data folder and check all that can be checked without decoding: headers, sizes, names, prompts.

    Two layouts: a folder of HQ images, degraded on the fly; or `lq/` (or `lr/`) and `gt/` (or `hq/`) with images of
    equal names, extensions aside.

    Args:
        path: the folder.
        scale: HQ is this many times LQ.
        crop: side of the square training crops in HQ pixels, a multiple of `scale`; None: for validation only.
        degradation: makes LQ images; needed with a folder of HQ images. Pairs ignore it: they are taken as they are.
        prompts: "adapter" leaves the text to the adapter; "sidecar" reads `<name>.txt` from `prompts/` or `tag/` in
            the folder or else from beside the HQ images; "captioner" asks `captions`; anything else is the one prompt
            of all images.
        captions: writes prompts from the LQ images; goes together with `prompts="captioner"`.
        extras: names of the tensors to read from `<name>.safetensors` in `extras/` in the folder, or else from beside
            the HQ images, where such files are.
        flips: mirror half of the training crops left to right.
        cache_mb: decoded images are kept up to this many megabytes.

    Raises:
        UserError: anything that is wrong with the folder or the settings.
    """
    path = expand(path)
    if crop is not None and (crop < scale or crop % scale):
        raise UserError(f"crop {crop} must be a positive multiple of the scale {scale}")
    folders = _paired_folders(path)
    if folders is None:
        if degradation is None:
            raise UserError(f"'{path}' holds HQ images only: set a degradation, or give pairs in lq/ and gt/")
        hq_paths = list_images(path)
        lq_paths: list[Path | None] = [None] * len(hq_paths)
    else:
        degradation = None
        matched = _match(*folders)
        hq_paths, lq_paths = [hq for hq, _ in matched], [lq for _, lq in matched]
    if captions is not None and prompts != CAPTIONER:
        raise UserError(f"data.captioner is set, but data.prompts is '{prompts}': set it to {CAPTIONER}")
    nothing = [None] * len(hq_paths)
    texts: Sequence[str | None] = resolve_prompts(hq_paths, ADAPTER if captions else prompts, path) or nothing
    files: Sequence[Path | None] = tensor_files(hq_paths, extras, path) or nothing
    items = [Item(*entry) for entry in zip(hq_paths, lq_paths, map(image_size, hq_paths), texts, files, strict=True)]
    _check_sizes(items, scale, crop)
    return Data(items, scale, crop, degradation, captions, extras, flips, cache_mb)


class Data:
    """Images of a folder as batches; made by `open_data`.

    Attributes:
        items: the images, in file order.
        scale: HQ is this many times LQ.
        crop: side of the training crops in HQ pixels.
    """

    def __init__(
        self,
        items: Sequence[Item],
        scale: int,
        crop: int | None,
        degradation: Degradation | None,
        captions: Captions | None,
        extras: Sequence[str],
        flips: bool,
        cache_mb: int,
    ) -> None:
        self.items = tuple(items)
        self.scale = scale
        self.crop = crop
        self._degradation = degradation
        self._captions = captions
        self._extras = tuple(extras)
        self._flips = flips
        self._cache = _ImageCache(cache_mb * 1_000_000)
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[int, tuple[int, ...]], Future[Batch]] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def identity(self) -> str:
        """A short text that tells this data from any other: names, sizes and samples of the files, and the prompts.

        A copy elsewhere has the same. It differs once an image, its partner, prompt or tensors come, go or change.

        Raises:
            UserError: a file cannot be read.
        """
        return identity_of(part for item in self.items for part in (item.hq, item.lq, item.prompt, item.extras))

    def check(self) -> None:
        """Decode every file once, which finds what headers hide; what fits stays in the cache.

        Raises:
            UserError: files are damaged; the first few are named.
        """
        damaged: list[str] = []
        for item in self.items:
            for path in (item.hq, item.lq):
                if path is None:
                    continue
                try:
                    self._cache.read(path)
                except UserError as error:
                    damaged.append(str(error))
        if damaged:
            raise UserError(f"{len(damaged)} of the image files are unusable: {'; '.join(damaged[:3])}")
        check_tensors([item.extras for item in self.items if item.extras is not None], self._extras)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        """Samples of the training stream.

        Args:
            seed: seed of the run.
            indices: their positions in the endless stream over all epochs and processes.

        Returns:
            `hq` (B, 3, crop, crop) and `lq` (B, 3, crop / scale, crop / scale) on the CPU; equal for equal arguments.

        Raises:
            UserError: a file has become unreadable since it was checked.
            ValueError: no indices, or the data was opened without `crop`.
        """
        key = (seed, tuple(indices))
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key:
            return ahead[1].result()
        return self._make_batch(*key)

    def prefetch(self, seed: int, indices: Sequence[int]) -> None:
        """Begin to make a batch in the background; the next `batch` of the same arguments picks it up.

        Saves time and changes nothing: a batch depends on its arguments only.
        """
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="rewardsr-data")
        key = (seed, tuple(indices))
        self._ahead = (key, self._worker.submit(self._make_batch, *key))

    def validation(
        self, limit: int | None = None, seed: int = 0, side: int | None = None, first: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """Whole images one by one in file order, the same ones every time.

        HQ images are cut at the centre to a multiple of `scale` and degraded with a seed from (seed, position).

        Args:
            limit: the first so many images; all by default.
            seed: of the degradation.
            side: cut larger images at the centre to this many HQ pixels a side; whole images by default.
            first, every: only the images at the positions first, first + every, ...: the share of one process.

        Raises:
            ValueError: `side` is smaller than `scale`.
        """
        if side is not None and side < self.scale:
            raise ValueError(f"validation: side {side} is smaller than the scale {self.scale}")
        for position, item in list(enumerate(self.items[:limit]))[first::every]:
            hq = self._cache.read(item.hq)
            sizes = [min(length, side or length) // self.scale * self.scale for length in hq.shape[-2:]]
            # Where there is an LQ image, the corner must lie on its pixels.
            step = 1 if item.lq is None else self.scale
            corner = [(length - size) // 2 // step * step for length, size in zip(hq.shape[-2:], sizes, strict=True)]
            random = generator(seed, 0, "validation", position)
            pair = self._pair(item, hq, (corner[0], corner[1]), (sizes[0], sizes[1]), False, random)
            yield self._stack([pair], [item])

    def item(self, seed: int, index: int) -> Item:
        """The image that sample `index` of the training stream shows."""
        epoch, place = divmod(index, len(self.items))
        return self.items[_order(len(self.items), seed, epoch)[place]]

    def _make_batch(self, seed: int, indices: tuple[int, ...]) -> Batch:
        if not indices or self.crop is None:
            raise ValueError("batch: needs at least one index, and data that was opened with a crop")
        items = [self.item(seed, index) for index in indices]
        return self._stack([self._sample(seed, *entry) for entry in zip(indices, items, strict=True)], items)

    def _stack(self, samples: list[tuple[Tensor, Tensor]], items: Sequence[Item]) -> Batch:
        lq = torch.stack([lq for lq, _ in samples])
        texts = tuple(item.prompt for item in items) if self._captions is None else self._captions(lq)
        return Batch(
            lq=lq,
            hq=torch.stack([hq for _, hq in samples]),
            prompts=None if None in texts else texts,
            paths=tuple(str(item.hq) for item in items),
            extras=stack_tensors([item.extras for item in items if item.extras is not None], self._extras),
        )

    def _sample(self, seed: int, index: int, item: Item) -> tuple[Tensor, Tensor]:
        """(lq, hq) of one training sample."""
        assert self.crop is not None
        hq = self._cache.read(item.hq)
        random = generator(seed, 0, "data", index)
        step = 1 if item.lq is None else self.scale  # a crop of a pair must lie on the pixels of the LQ image
        # All draws are made whatever the options, so that changing one of them does not change the others.
        top, left = (
            int(torch.randint((length - self.crop) // step + 1, (), generator=random)) * step
            for length in hq.shape[-2:]
        )
        flip = bool(torch.randint(2, (), generator=random)) and self._flips
        return self._pair(item, hq, (top, left), (self.crop, self.crop), flip, random)

    def _pair(
        self,
        item: Item,
        hq: Tensor,
        corner: tuple[int, int],
        size: tuple[int, int],
        flip: bool,
        random: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """(lq, hq) as float images, cut out of a cached HQ image and what belongs to it."""
        high = _cut(hq, corner, size)
        if flip:
            high = high.flip(-1)
        if item.lq is None:
            assert self._degradation is not None
            low = self._degradation(high.contiguous(), random)
            expected = (3, size[0] // self.scale, size[1] // self.scale)
            if low.shape != expected:
                raise UserError(f"the degradation made {tuple(low.shape)} of {tuple(high.shape)}, expected {expected}")
            return low, high
        low = _cut(
            self._cache.read(item.lq),
            (corner[0] // self.scale, corner[1] // self.scale),
            (size[0] // self.scale, size[1] // self.scale),
        )
        return low.flip(-1) if flip else low, high


class _ImageCache:
    """Decoded images, least recently used ones dropped first; 8-bit images are kept in 8 bits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._images: OrderedDict[Path, Tensor] = OrderedDict()
        self._lock = Lock()  # the prefetching thread reads too

    def read(self, path: Path) -> Tensor:
        """(3, H, W), float32 in [0, 1] or uint8; not to be written to."""
        with self._lock:
            if path in self._images:
                self._images.move_to_end(path)
                return self._images[path]
        image = read_image(path)
        small = to_uint8(image)
        if torch.equal(small.float() / 255, image):
            image = small
        with self._lock:
            if path not in self._images:
                self._images[path] = image
                self._bytes += image.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


def _cut(image: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A part of a cached image as float32."""
    part = image[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    return part.float() / 255 if part.dtype == torch.uint8 else part.clone()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, "order", 0)).tolist()


def _paired_folders(path: Path) -> tuple[Path, Path] | None:
    """(lq, hq) folders, or None for a folder of HQ images."""
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


def _match(lq_folder: Path, hq_folder: Path) -> list[tuple[Path, Path]]:
    """(hq, lq) files with equal stems, in file order of the HQ images."""
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


def _check_sizes(items: Sequence[Item], scale: int, crop: int | None) -> None:
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
