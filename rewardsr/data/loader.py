"""What makes data fast: threads that work ahead of the training step, and images that stay decoded.

PIL and torch let go of Python's lock while they work, so threads are enough, and share one cache.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rewardsr.data.images import read_pixels, to_uint8
from rewardsr.data.rows import Stored

R = TypeVar("R")
S = TypeVar("S")  # a sample
T = TypeVar("T")  # what is made of several

AHEAD_BYTES = 512_000_000  # of samples that are made before their turn; one batch is always made ahead


def default_workers() -> int:
    """Threads for one process: the machine's cores among its processes, one left to the step; 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = int(said) if said.isascii() and said.isdecimal() and int(said) else 1
    return max(1, min(8, cores // processes - 1))


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread, as it does in those of `Workers`: resizing and Fourier transforms give
    other last bits with several."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


class Workers(Generic[S, T]):
    """Makes batches of samples in threads, as they are asked for or ahead of that. Results depend on neither.

    Samples are begun in the order in which they are announced. What goes wrong in one is raised when its batch is asked
    for.

    Args:
        count: threads; 0: everything is made by whoever asks for it.
        sample: makes the sample of (seed, index).
        gather: makes a batch of samples; called with them, the seed and the indices.
        sample_bytes: memory of a sample.
    """

    def __init__(
        self,
        count: int,
        sample: Callable[[int, int], S],
        gather: Callable[[list[S], int, tuple[int, ...]], T],
        sample_bytes: int,
    ) -> None:
        self._count, self._sample, self._gather = count, sample, gather
        self._most = AHEAD_BYTES // max(1, sample_bytes)  # samples made ahead
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, tuple[int, ...]], _Making[S, T]] = {}

    def batch(self, seed: int, indices: Sequence[int]) -> T:
        """The batch of these indices; what was announced instead of it is dropped."""
        key = seed, tuple(indices)
        if not self._count:
            return self._gather([self._sample(seed, index) for index in key[1]], *key)
        if key not in self._ahead:
            self._drop()
            self._begin(*key)
        return self._ahead.pop(key).batch.result()

    def prefetch(self, seed: int, batches: Iterable[Sequence[int]]) -> None:
        """Begin with the batches that will be asked for next, in their order, until enough are made ahead.

        That is two batches, and two samples a thread, as far as memory allows. `batches` may be endless.
        """
        if not self._count:
            return
        for indices in batches:
            key = seed, tuple(indices)
            if key in self._ahead:
                continue
            waiting = sum(len(known) for _, known in self._ahead)
            enough = min(2 * max(len(key[1]), self._count), self._most)
            if waiting and waiting + len(key[1]) > enough:
                return
            self._begin(*key)

    def map(self, function: Callable[[int], R], numbers: Iterable[int]) -> Iterator[R]:
        """`function` of each number, in order."""
        return self._threads().map(function, numbers) if self._count else map(function, numbers)

    def close(self) -> None:
        """Drop what was announced and let the threads end; the next call starts new ones."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _begin(self, seed: int, indices: tuple[int, ...]) -> None:
        samples = [partial(self._sample, seed, index) for index in indices]
        making = self._ahead[seed, indices] = _Making(samples, lambda made: self._gather(made, seed, indices))
        for place in range(len(indices)):
            self._threads().submit(making.make, place)

    def _drop(self) -> None:
        for making in self._ahead.values():
            making.dropped = True
        self._ahead.clear()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            # Samples are small: threads of torch's own for each of these would only be in each other's way. The setting
            # is the calling thread's.
            self._pool = ThreadPoolExecutor(self._count, "rewardsr-data", torch.set_num_threads, (1,))
        return self._pool


class _Making(Generic[S, T]):
    """A batch on its way: whoever makes its last sample puts it together, so that no thread waits for another.

    Attributes:
        batch: the batch, or what went wrong in the first of its samples that failed.
        dropped: nobody will ask for it.
    """

    def __init__(self, samples: Sequence[Callable[[], S]], gather: Callable[[list[S]], T]) -> None:
        self.batch: Future[T] = Future()
        self.dropped = False
        self._samples, self._gather = samples, gather
        self._made: dict[int, Future[S]] = {}
        self._lock = Lock()

    def make(self, place: int) -> None:
        """Make the sample at this place."""
        if self.dropped:
            return
        made: Future[S] = Future()
        try:
            made.set_result(self._samples[place]())
        except BaseException as error:
            made.set_exception(error)
        with self._lock:
            self._made[place] = made
            if len(self._made) < len(self._samples):
                return
        try:
            self.batch.set_result(self._gather([self._made[place].result() for place in range(len(self._samples))]))
        except BaseException as error:
            self.batch.set_exception(error)


class ImageCache:
    """Decoded images, least recently used ones dropped first; 8-bit images are kept in 8 bits.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._images: OrderedDict[Stored, Tensor] = OrderedDict()
        self._lock = Lock()

    def read(self, path: Stored) -> Tensor:
        """(3, H, W), float32 in [0, 1] or uint8; not to be written to.

        Raises:
            UserError: as `read_image`.
        """
        with self._lock:
            if path in self._images:
                self._images.move_to_end(path)
                return self._images[path]
        image = read_pixels(path)
        if image.dtype != torch.uint8:
            small = to_uint8(image)
            image = small if torch.equal(small.float() / 255, image) else image
        with self._lock:
            if path not in self._images:
                self._images[path] = image
                self._bytes += image.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image
