"""All randomness of the project: one function, `draw`, and the sources it draws from.

A source belongs to a batch and holds one generator a sample, seeded from (seed, step, stream, index of the sample
in the whole batch over all processes). So a resumed run equals an uninterrupted one, two processes equal one, and
a test can replay recorded noise.
"""

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from rewardsr.transfer import to_device


class Source(Protocol):
    """Where random numbers come from: `Draws` in training, `Replay` in tests."""

    def take(self, shape: tuple[int, ...], high: int | None) -> Tensor:
        """Next numbers of this shape: N(0, 1) float32, or int64 in [0, high) where `high` is given."""
        ...

    def rows(self, rows: slice) -> "Source":
        """A source for some rows of the batch: what they draw from it is what they would have drawn from the whole."""
        ...


class Draws:
    """A source with one generator per sample of a batch.

    Args:
        seed: seed of the run.
        step: optimiser step (or any counter that separates draws in time).
        samples: index of each sample of this batch in the whole batch over all processes.
        stream: name that keeps the draws of different purposes apart ("group", "update-0", "validation").
    """

    def __init__(self, seed: int, step: int, samples: Sequence[int], stream: str = "") -> None:
        self._generators = [generator(seed, step, stream, index) for index in samples]

    def take(self, shape: tuple[int, ...], high: int | None) -> Tensor:
        """Numbers of this shape; rows b*k .. b*k+k-1 come from sample b's generator, whatever the other samples are."""
        rows, samples = shape[0], len(self._generators)
        if rows % samples:
            raise ValueError(
                f"draw of {rows} rows from a source of {samples} samples: rows must be a multiple of samples"
            )
        each = (rows // samples, *shape[1:])
        if high is None:
            parts = [torch.randn(each, generator=own) for own in self._generators]
        else:
            parts = [torch.randint(high, each, generator=own) for own in self._generators]
        return torch.cat(parts)

    def rows(self, rows: slice) -> "Draws":
        """The generators of some samples, which go on here and there alike."""
        part = copy(self)
        part._generators = self._generators[rows]
        return part


class Replay:
    """A source that gives back recorded tensors in order; for agreement with recorded runs.

    Args:
        recorded: the tensors, in the order in which they will be asked for.
    """

    def __init__(self, recorded: Sequence[Tensor]) -> None:
        self._recorded = list(recorded)

    def take(self, shape: tuple[int, ...], high: int | None) -> Tensor:
        """The next recorded tensor, reshaped.

        Raises:
            ValueError: nothing is left, or the next tensor has another number of elements.
        """
        if not self._recorded:
            raise ValueError(f"replay is used up, but {shape} was asked for")
        tensor = self._recorded.pop(0)
        if tensor.numel() != torch.Size(shape).numel():
            raise ValueError(f"replay holds {tuple(tensor.shape)} next, but {shape} was asked for")
        return tensor.reshape(shape)

    def rows(self, rows: slice) -> "Replay":
        """The same rows of all recorded tensors that are left."""
        return Replay([tensor[rows] for tensor in self._recorded])

    @property
    def left(self) -> int:
        """How many recorded tensors have not been asked for."""
        return len(self._recorded)


def draw(
    shape: Sequence[int],
    generator: Source | torch.Generator,
    high: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random numbers: the only place where the project makes them.

    Drawn on the CPU and then moved without waiting, so that a CPU and a CUDA run see the same noise.

    Args:
        shape: (rows, ...); with `Draws`, rows is a multiple of its number of samples.
        generator: a `Draws`, a `Replay`, or a plain CPU torch.Generator.
        high: None for N(0, 1) float32; else int64 uniform in [0, high).
        device: where the result lives; the CPU by default.
    """
    size = tuple(shape)
    if not isinstance(generator, torch.Generator):
        numbers = generator.take(size, high)
    elif high is None:
        numbers = torch.randn(size, generator=generator, device=generator.device)
    else:
        numbers = torch.randint(high, size, generator=generator, device=generator.device)
    return numbers if device is None else to_device(numbers, device)


def generator(seed: int, step: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator that depends on the four and on nothing else; what `Draws` is made of.

    Args:
        seed: seed of the run.
        step: any counter that separates draws in time.
        stream: name that keeps the draws of different purposes apart ("crop", "validation").
        index: index of the sample over all processes.
    """
    return torch.Generator().manual_seed(seed_of(seed, step, stream, index))


def seed_of(seed: int, step: int, stream: str, sample: int) -> int:
    """A 63-bit seed from the four, by hashing: neighbouring inputs give unrelated generators."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
