"""The order of training: which image each sample of the endless stream shows, from (seed, index) alone."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from rewardsr.draws import generator
from rewardsr.errors import UserError

BLOCK = 1000  # samples in which every source has exactly its share


class Order:
    """Images in an endless stream of epochs.

    Without shares all images are one set, and every epoch is a permutation of it. With shares each block of 1000
    samples has as many of each source as its share says, in an order drawn for that block, and every source goes
    through epochs of its own.

    Args:
        sources: for each image, the number of its source.
        shares: of each source, adding up to about 1; None: no shares.

    Raises:
        UserError: a share is too small to be ever drawn, or has no images.
    """

    def __init__(self, sources: Sequence[int], shares: Sequence[float] | None) -> None:
        if shares is None:
            self._images: list[Sequence[int]] = [range(len(sources))]
            self._quotas: tuple[int, ...] = (BLOCK,)
            return
        self._images = [[place for place, own in enumerate(sources) if own == number] for number in range(len(shares))]
        self._quotas = _quotas(shares)
        if not all(self._images):
            raise UserError(f"source {self._images.index([])} of data.train has a share, but no image that can be read")

    def place(self, seed: int, index: int) -> int:
        """The number of the image that a sample shows.

        Args:
            seed: of the run.
            index: of the sample in the stream over all epochs and processes.
        """
        if len(self._quotas) == 1:
            source, turn = 0, index
        else:
            block, within = divmod(index, BLOCK)
            source, earlier = _block(self._quotas, seed, block)[within]
            turn = block * self._quotas[source] + earlier
        images = self._images[source]
        epoch, rank = divmod(turn, len(images))
        return images[_permutation(len(images), seed, epoch, source)[rank]]


def _quotas(shares: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in a block, by largest remainders."""
    exact = [BLOCK * share / sum(shares) for share in shares]
    quotas = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda number: quotas[number] - exact[number])
    for number in by_remainder[: BLOCK - sum(quotas)]:
        quotas[number] += 1
    if not all(quotas):
        raise UserError(
            f"a probability of {min(shares):g} is less than one of {BLOCK} samples: raise it, or leave it out"
        )
    return tuple(quotas)


@lru_cache(maxsize=4)
def _block(quotas: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """Of each sample in a block: its source, and how many before it in the block have the same."""
    numbers = [number for number, quota in enumerate(quotas) for _ in range(quota)]
    seen = [0] * len(quotas)
    found = []
    for place in torch.randperm(BLOCK, generator=generator(seed, block, "source", 0)).tolist():
        source = numbers[place]
        found.append((source, seen[source]))
        seen[source] += 1
    return found


@lru_cache(maxsize=16)
def _permutation(count: int, seed: int, epoch: int, source: int) -> list[int]:
    """The order of an epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, "order", source)).tolist()
