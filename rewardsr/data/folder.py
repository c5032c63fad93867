"""Image folders to batches, without state.

Training reads an endless stream of samples: sample k belongs to epoch k // len(data) and stands at a place in a
permutation seeded by (seed, epoch); its crop, flip and degradation are seeded by (seed, k). So any process or thread
can make any sample, a resumed run equals an uninterrupted one, and the size of a batch does not matter.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.data.captions import Captions
from rewardsr.data.degrade.contract import Degradation
from rewardsr.data.identity import identity_of
from rewardsr.data.images import image_size, list_images
from rewardsr.data.layout import Item, check_sizes, match, paired_folders
from rewardsr.data.loader import ImageCache, Workers, one_thread
from rewardsr.data.sidecars import (
    ADAPTER,
    CAPTIONER,
    check_tensors,
    resolve_prompts,
    stack_tensors,
    tensor_files,
)
from rewardsr.draws import generator
from rewardsr.errors import UserError
from rewardsr.storage import expand

Damaged = list[tuple[int, str]]
"""What is wrong with files, by the position of their image."""


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
    workers: int = 0,
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
        workers: threads that decode, cut out and degrade; 0: whoever asks for a batch makes it.

    Raises:
        UserError: anything that is wrong with the folder or the settings.
    """
    path = expand(path)
    if crop is not None and (crop < scale or crop % scale):
        raise UserError(f"crop {crop} must be a positive multiple of the scale {scale}")
    folders = paired_folders(path)
    if folders is None:
        if degradation is None:
            raise UserError(f"'{path}' holds HQ images only: set a degradation, or give pairs in lq/ and gt/")
        hq_paths = list_images(path)
        lq_paths: list[Path | None] = [None] * len(hq_paths)
    else:
        degradation = None
        matched = match(*folders)
        hq_paths, lq_paths = [hq for hq, _ in matched], [lq for _, lq in matched]
    if captions is not None and prompts != CAPTIONER:
        raise UserError(f"data.captioner is set, but data.prompts is '{prompts}': set it to {CAPTIONER}")
    nothing = [None] * len(hq_paths)
    texts: Sequence[str | None] = resolve_prompts(hq_paths, ADAPTER if captions else prompts, path) or nothing
    files: Sequence[Path | None] = tensor_files(hq_paths, extras, path) or nothing
    items = [Item(*entry) for entry in zip(hq_paths, lq_paths, map(image_size, hq_paths), texts, files, strict=True)]
    check_sizes(items, scale, crop)
    return Data(items, scale, crop, degradation, captions, extras, flips, cache_mb, workers)


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
        workers: int,
    ) -> None:
        self.items = tuple(items)
        self.scale = scale
        self.crop = crop
        self._degradation = degradation
        self._captions = captions
        self._extras = tuple(extras)
        self._flips = flips
        self._cache = ImageCache(cache_mb * 1_000_000)
        self._workers = Workers(workers, self._sample, self._gather, sample_bytes=24 * (crop or 0) ** 2)

    def __len__(self) -> int:
        return len(self.items)

    def identity(self) -> str:
        """A short text that tells this data from any other: names, sizes and samples of the files, and the prompts.

        A copy elsewhere has the same. It differs once an image, its partner, prompt or tensors come, go or change.

        Raises:
            UserError: a file cannot be read.
        """
        return identity_of(part for item in self.items for part in (item.hq, item.lq, item.prompt, item.extras))

    def check(
        self,
        first: int = 0,
        every: int = 1,
        limit: int | None = None,
        together: Callable[[Callable[[], Damaged]], list[Damaged]] = lambda work: [work()],
    ) -> None:
        """Decode every file once, which finds what headers hide; what fits stays in the cache.

        Args:
            first, every: of processes that share the work, this one's number and how many there are.
            limit: only the first so many images.
            together: calls a function in every process and returns what it gives in each.

        Raises:
            UserError: files are damaged; the first few are named.
        """
        share = range(len(self.items[:limit]))[first::every]

        def look() -> Damaged:
            found = self._workers.map(self._damage, share)
            damaged = [(position, text) for position, texts in zip(share, found, strict=True) for text in texts]
            # All of them must be shaped as the first.
            files = [self.items[position].extras for position in (0, *share)]
            check_tensors([file for file in files if file is not None], self._extras)
            return damaged

        damaged = [text for _, text in sorted(entry for found in together(look) for entry in found)]
        if damaged:
            raise UserError(f"{len(damaged)} of the image files are unusable: {'; '.join(damaged[:3])}")

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
        if not indices or self.crop is None:
            raise ValueError("batch: needs at least one index, and data that was opened with a crop")
        return self._workers.batch(seed, indices)

    def prefetch(self, seed: int, batches: Iterable[Sequence[int]]) -> None:
        """Begin to make the batches that will be asked for next, as many as there is room for.

        Saves time and changes nothing: a batch depends on its arguments only. Without workers nothing happens.

        Args:
            seed: seed of the run.
            batches: the indices of each, in the order in which they will be asked for; may be endless.
        """
        self._workers.prefetch(seed, batches)

    def close(self) -> None:
        """Let the threads end, whatever they were about to do."""
        self._workers.close()

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
            UserError: `side` is smaller than `scale`.
        """
        if side is not None and side < self.scale:
            raise UserError(f"validation_side is {side}, expected at least the scale, {self.scale}")
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

    def _damage(self, position: int) -> list[str]:
        """What is wrong with the files of an image."""
        found = []
        for path in (self.items[position].hq, self.items[position].lq):
            try:
                if path is not None:
                    self._cache.read(path)
            except UserError as error:
                found.append(str(error))
        return found

    def _gather(self, samples: list[tuple[Tensor, Tensor]], seed: int, indices: tuple[int, ...]) -> Batch:
        return self._stack(samples, [self.item(seed, index) for index in indices])

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

    def _sample(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """(lq, hq) of one training sample."""
        assert self.crop is not None
        item = self.item(seed, index)
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
            with one_thread():
                low = self._degradation(high.contiguous()[None], [random])[0]
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


def _cut(image: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A part of a cached image as float32."""
    part = image[:, corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    floats = part.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return floats.div_(255) if part.dtype == torch.uint8 else floats


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, "order", 0)).tolist()
