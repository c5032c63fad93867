"""Images to batches, without state.

Training reads an endless stream of samples: which image sample k shows follows from (seed, k) as `rewardsr.data.order`
has it; its crop, flip, degradation and prompt are seeded by (seed, k). So any process or thread can make any sample, a
resumed run equals an uninterrupted one, and the size of a batch does not matter.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from rewardsr import progress
from rewardsr.batch import Batch
from rewardsr.data.captions import Captions
from rewardsr.data.degrade.contract import Degradation
from rewardsr.data.identity import identity_of
from rewardsr.data.items import Item, Wanted, centre, open_source, refuse_many
from rewardsr.data.loader import ImageCache, Workers, one_thread
from rewardsr.data.order import Order
from rewardsr.data.pixels import Decoded, Pair, as_floats
from rewardsr.data.rows import Stored
from rewardsr.data.sidecars import ADAPTER, CAPTIONER, check_tensors, stack_tensors
from rewardsr.draws import generator
from rewardsr.errors import UserError
from rewardsr.train.recipe import SourceRecipe

Damaged = list[tuple[int, str]]
"""What is wrong with files, by the position of their image."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """How images become samples; the fields are arguments of `open_data`."""

    scale: int
    crop: int | None
    degradation: Degradation | None
    captions: Captions | None
    caption_hq: bool
    prompt_dropout: float
    extras: Sequence[str]
    pad: bool
    flips: bool


def open_data(
    sources: Path | str | Sequence[SourceRecipe],
    *,
    scale: int,
    crop: int | None = None,
    degradation: Degradation | None = None,
    prompts: str = ADAPTER,
    caption_column: str = "text",
    suffix: str = "",
    captions: Captions | None = None,
    caption_hq: bool = False,
    prompt_dropout: float = 0.0,
    extras: Sequence[str] = (),
    pad: bool = False,
    max_unreadable: float = 0.01,
    flips: bool = True,
    cache_mb: int = 512,
    workers: int = 0,
) -> "Data":
    """Open images and check all that can be checked without decoding: headers, sizes, names, prompts.

    A folder holds HQ images, degraded on the fly; or `lq/` (`lr/`, `sr_bicubic/`) and `gt/` (or `hq/`) with images of
    equal names, extensions aside; or `lq/` alone. Folders inside are searched, too. `SourceRecipe` has the other kinds.

    Args:
        sources: one place, or several whose images are mixed.
        scale: HQ is this many times LQ.
        crop: side of the square training crops in HQ pixels, a multiple of `scale`; None: for validation only.
        degradation: makes LQ images; needed with HQ images alone. Others ignore it: they are taken as they are.
        prompts: "adapter" leaves the text to the adapter; "sidecar" reads `<name>.txt` from `prompts/` or `tag/` in
            the folder or else from beside the images; "metadata" reads metadata.jsonl, or a column of a data set;
            "captioner" asks `captions`; anything else is the one prompt of all images.
        caption_column: of the texts in metadata.jsonl or in a data set.
        suffix: follows each of these texts after a comma; `captions` have their own.
        captions: writes prompts from the LQ images; goes together with `prompts="captioner"`.
        caption_hq: they are written from the whole HQ images in training.
        prompt_dropout: share of the training samples whose prompt is empty.
        extras: names of the tensors to read from `<name>.safetensors` in `extras/` in the folder, or else from beside
            the images, where such files are.
        pad: images smaller than the crop are padded by mirroring; else they are left out.
        max_unreadable: share of the images that may be unreadable, now or (in each process) when their turn comes;
            they are left out.
        flips: mirror half of the training crops left to right.
        cache_mb: decoded images are kept up to this many megabytes.
        workers: threads that decode, cut out and degrade; 0: whoever asks for a batch makes it.

    Raises:
        UserError: anything that is wrong with the images or the settings.
    """
    if isinstance(sources, Path | str):
        sources = [SourceRecipe(path=str(sources))]
    if crop is not None and (crop < scale or crop % scale):
        raise UserError(f"crop {crop} must be a positive multiple of the scale {scale}")
    if captions is not None and prompts != CAPTIONER:
        raise UserError(f"data.captioner is set, but data.prompts is '{prompts}': set it to {CAPTIONER}")
    texts = ADAPTER if captions else prompts
    wanted = Wanted(scale, crop, pad, max_unreadable, degradation is not None, texts, caption_column, suffix, extras)
    opened = [open_source(source, number, wanted) for number, source in enumerate(sources)]
    items = [item for one in opened for item in one.items]
    said = "; ".join(one.said for one in opened)
    total, unreadable = (sum(number) for number in zip(*((one.total, one.unreadable) for one in opened), strict=True))
    if len({item.hq is None for item in items}) > 1 or len({item.extras is None for item in items}) > 1:
        raise UserError(f"HQ images or tensors are there in some sources and not in others: {said}")
    if caption_hq and items[0].hq is None:
        raise UserError(f"data.caption_from is 'hq', but there are {said}")
    shares = [source.probability for source in sources if source.probability is not None]
    making = Making(scale, crop, degradation, captions, caption_hq, prompt_dropout, extras, pad, flips)
    left = int(max_unreadable * total) - unreadable
    return Data(items, making, shares or None, said, total, left, cache_mb, workers)


class Data:
    """Images as batches; made by `open_data`.

    Attributes:
        items: the images, in file order.
        scale: HQ is this many times LQ.
        crop: side of the training crops in HQ pixels.
        said: how many images of what kind are where, in words.
    """

    def __init__(
        self,
        items: Sequence[Item],
        making: Making,
        shares: Sequence[float] | None,
        said: str,
        total: int,
        left: int,
        cache_mb: int,
        workers: int,
    ) -> None:
        self.scale, self.crop, self.said = making.scale, making.crop, said
        self._making, self._shares = making, shares
        self._total, self._left = total, left  # images, and how many of them may turn out to be unreadable
        self._unreadable: set[Stored] = set()  # found while samples were made
        self._captioned: dict[Stored, str] = {}
        self._lock = Lock()
        self._use(items)
        self._cache = ImageCache(cache_mb * 1_000_000)
        self._workers = Workers(workers, self._sample, self._gather, sample_bytes=24 * (self.crop or 0) ** 2)

    def _use(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)
        self._order = Order([item.source for item in items], self._shares)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_hq(self) -> bool:
        """Whether the images have targets."""
        return self.items[0].hq is not None

    def identity(self) -> str:
        """A short text that tells this data from any other: names, sizes and samples of the files, and the prompts.

        A copy elsewhere has the same. It differs once an image, its partner, prompt or tensors come, go or change, or
        sources have other shares.

        Raises:
            UserError: a file cannot be read.
        """
        shares = [f"source {item.source}" for item in self.items] + [str(self._shares)] if self._shares else []
        parts = (part for item in self.items for part in (item.hq, item.lq, item.prompt, item.extras))
        return identity_of([*parts, *shares])

    def check(
        self,
        first: int = 0,
        every: int = 1,
        limit: int | None = None,
        together: Callable[[Callable[[], Damaged]], list[Damaged]] = lambda work: [work()],
    ) -> None:
        """Decode every file once, which finds what headers hide; what fits stays in the cache.

        Images that are damaged are left out.

        Args:
            first, every: of processes that share the work, this one's number and how many there are.
            limit: only the first so many images.
            together: calls a function in every process and returns what it gives in each.

        Raises:
            UserError: too many files are damaged; the first few are named.
        """
        share = range(len(self.items[:limit]))[first::every]

        def look() -> Damaged:
            damaged = []
            with progress.bar("checking images", len(share)) as advance:
                for position, text in zip(share, self._workers.map(self._damage, share), strict=True):
                    damaged += [] if text is None else [(position, text)]
                    advance()
            # All of them must be shaped as the first.
            files = [self.items[position].extras for position in (0, *share)]
            check_tensors([file for file in files if file is not None], self._making.extras)
            return damaged

        damaged = dict(entry for found in together(look) for entry in found)
        refuse_many([damaged[position] for position in sorted(damaged)], self._total, self._spare())
        if damaged:
            self._left -= len(damaged)
            self._use([item for position, item in enumerate(self.items) if position not in damaged])

    def _spare(self) -> int:
        """How many images may turn out to be unreadable; one at least is to be shown."""
        return min(self._left, len(self.items) - 1)

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        """Samples of the training stream.

        Args:
            seed: seed of the run.
            indices: their positions in the endless stream over all epochs and processes.

        Returns:
            `hq` (B, 3, crop, crop), unless there are LQ images alone, and `lq` (B, 3, crop / scale, crop / scale) on
            the CPU; equal for equal arguments.

        Raises:
            UserError: too many files have become unreadable since they were checked.
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
            UserError: `side` is smaller than `scale`, or a file has become unreadable.
        """
        if side is not None and side < self.scale:
            raise UserError(f"validation_side is {side}, expected at least the scale, {self.scale}")
        for position, item in list(enumerate(self.items[:limit]))[first::every]:
            whole = self._read(item)
            corner, size = centre(whole.lengths, self.scale, side, whole.step)
            random = generator(seed, 0, "validation", position)
            pair = self._pair(whole, corner, size, False, random)
            captions = self._making.captions
            text = item.prompt if captions is None else captions(pair.lq[None], keep=True)[0]
            yield self._stack([_Sample(item, pair, text)])

    def item(self, seed: int, index: int) -> Item:
        """The image that sample `index` of the training stream shows."""
        return self.items[self._order.place(seed, index)]

    def _damage(self, position: int) -> str | None:
        """What is wrong with the files of an image."""
        try:
            self._read(self.items[position])
        except UserError as error:
            return str(error)
        return None

    def _read(self, item: Item) -> Decoded:
        """The decoded images of an item."""
        hq, lq = (None if path is None else self._cache.read(path) for path in (item.hq, item.lq))
        return Decoded(hq, lq, self.scale)

    def _readable(self, seed: int, index: int) -> tuple[Item, Decoded]:
        """The image of a sample, decoded; in place of one that has become unreadable another, drawn for the sample."""
        item, attempt = self.item(seed, index), 0
        while True:
            if item.shown not in self._unreadable:
                try:
                    whole = self._read(item)
                    if min(whole.lengths) < (self.crop or 0) and not self._making.pad:
                        raise UserError(f"'{item.shown}' was as large as the crop before and is not any more")
                    return item, whole
                except UserError as error:
                    self._leave_out(item, error)
            attempt += 1
            random = generator(seed, attempt, "instead", index)
            item = self.items[int(torch.randint(len(self.items), (), generator=random))]

    def _leave_out(self, item: Item, error: UserError) -> None:
        with self._lock:
            if item.shown not in self._unreadable:
                if len(self._unreadable) >= self._spare():
                    raise UserError(f"{error}; more are unreadable than data.max_unreadable allows") from error
                self._unreadable.add(item.shown)
                logger.warning("%s; it is left out, as are %d others", error, len(self._unreadable) - 1)

    def _sample(self, seed: int, index: int) -> "_Sample":
        """One training sample."""
        assert self.crop is not None
        item, whole = self._readable(seed, index)
        padded = whole.padded(self.crop)
        random = generator(seed, 0, "data", index)
        # All draws are made whatever the options, so that changing one of them does not change the others.
        top, left = (
            int(torch.randint((length - self.crop) // whole.step + 1, (), generator=random)) * whole.step
            for length in padded.lengths
        )
        flip = bool(torch.randint(2, (), generator=random)) and self._making.flips
        pair = self._pair(padded, (top, left), (self.crop, self.crop), flip, random)
        return _Sample(item, pair, self._text(seed, index, item, whole, pair))

    def _text(self, seed: int, index: int, item: Item, whole: Decoded, pair: Pair) -> str | None:
        """The prompt of a training sample."""
        dropout, captions = self._making.prompt_dropout, self._making.captions
        if dropout and float(torch.rand((), generator=generator(seed, 0, "prompt", index))) < dropout:
            return ""
        if captions is None:
            return item.prompt
        if not self._making.caption_hq:
            return captions(pair.lq[None])[0]
        if item.shown not in self._captioned:
            assert whole.hq is not None
            self._captioned[item.shown] = captions(as_floats(whole.hq)[None], keep=True)[0]
        return self._captioned[item.shown]

    def _gather(self, samples: list["_Sample"], seed: int, indices: tuple[int, ...]) -> Batch:
        return self._stack(samples)

    def _stack(self, samples: list["_Sample"]) -> Batch:
        texts = tuple(sample.text for sample in samples)
        hq = [sample.pair.hq for sample in samples if sample.pair.hq is not None]
        files = [sample.item.extras for sample in samples if sample.item.extras is not None]
        return Batch(
            lq=torch.stack([sample.pair.lq for sample in samples]),
            hq=torch.stack(hq) if hq else None,
            prompts=texts if any(text is not None for text in texts) else None,
            paths=tuple(str(sample.item.shown) for sample in samples),
            extras=stack_tensors(files, self._making.extras),
        )

    def _pair(
        self, whole: Decoded, corner: tuple[int, int], size: tuple[int, int], flip: bool, random: torch.Generator
    ) -> Pair:
        """What is cut out of decoded images, LQ made by the degradation where there is none."""
        hq, lq = whole.cut(corner, size, flip)
        if lq is None:
            assert hq is not None and self._making.degradation is not None
            with one_thread():
                lq = self._making.degradation(hq.contiguous()[None], [random])[0]
            expected = (3, size[0] // self.scale, size[1] // self.scale)
            if lq.shape != expected:
                raise UserError(f"the degradation made {tuple(lq.shape)} of {tuple(hq.shape)}, expected {expected}")
        return Pair(hq, lq)


@dataclass(frozen=True)
class _Sample:
    item: Item
    pair: Pair
    text: str | None
