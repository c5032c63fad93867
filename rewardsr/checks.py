"""Looks at values on a device, taken together: each one waits for all that was launched before it.

Outside of `gathered`, and for tensors on the CPU, a check looks at once. Inside, what lies on a device is only noted
down; the training loop reads all notes with the step's numbers, before anything that they forbid can reach a weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Otherwise = Callable[[], Exception | None]


class Gathered:
    """Checks that were noted down and not yet read."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Otherwise]] = []

    @property
    def flags(self) -> list[Tensor]:
        """Scalars, 1 where a check holds, in the order in which they were noted down."""
        return [holds for holds, _ in self._noted]

    def judge(self, flags: Sequence[float]) -> None:
        """Do what is to be done about each check that does not hold, and forget them all.

        Args:
            flags: the values of `flags`, read.
        """
        noted, self._noted = self._noted, []
        for value, (_, otherwise) in zip(flags, noted, strict=True):
            if not value:
                _do(otherwise)


_OPEN: ContextVar[Gathered | None] = ContextVar("gathered", default=None)


@contextmanager
def gathered() -> Iterator[Gathered]:
    """Inside, checks of values on a device are noted down; whoever opens this reads and judges them."""
    own = Gathered()
    before = _OPEN.set(own)
    try:
        yield own
    finally:
        _OPEN.reset(before)


def check(holds: Tensor, otherwise: Otherwise) -> None:
    """See to it, at once or when the checks are read, that a condition holds.

    Args:
        holds: scalar bool; a comparison is false for NaN, too.
        otherwise: called if it does not; returns the error to raise, or None where a warning was all. It may read
            values.
    """
    noted = _OPEN.get()
    if noted is not None and holds.device.type != "cpu":
        noted._noted.append((holds.float(), otherwise))
    elif not holds:
        _do(otherwise)


def read(scalars: Sequence[Tensor | float]) -> list[float]:
    """The values of scalars, of which those on a device are read together, in float32."""
    away = [scalar.detach().float() for scalar in scalars if isinstance(scalar, Tensor) and scalar.device.type != "cpu"]
    values = iter(torch.stack(away).tolist() if away else [])
    return [
        next(values) if isinstance(scalar, Tensor) and scalar.device.type != "cpu" else float(scalar)
        for scalar in scalars
    ]


def _do(otherwise: Otherwise) -> None:
    error = otherwise()
    if error is not None:
        raise error
