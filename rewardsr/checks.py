"""Looks at values on a device, taken together: each one waits for all that was launched before it.

Outside of `gathered`, and for tensors on the CPU, a check looks at once. Inside, what lies on a device is only noted
down; the training loop reads all notes with the step's numbers, before anything that they forbid can reach a weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

RANGE_SLACK = 1e-3  # resampling and half precision overshoot [0, 1] a little; more than this is another convention


@dataclass(frozen=True)
class _Note:
    holds: Tensor
    error: Callable[[], Exception] | None
    say: Callable[[], object] | None


class Gathered:
    """Checks and remarks that were noted down and not yet read."""

    def __init__(self) -> None:
        self._notes: list[_Note] = []

    @property
    def flags(self) -> list[Tensor]:
        """Scalars, 1 where a condition holds, in the order in which they were noted down."""
        return [note.holds for note in self._notes]

    @property
    def fatal(self) -> list[Tensor]:
        """Those of `flags` that are checks."""
        return [note.holds for note in self._notes if note.error is not None]

    def judge(self, flags: Sequence[float]) -> Exception | None:
        """Make the remarks that are due, and return the error of the first check that does not hold; forget them all.

        Args:
            flags: the values of `flags`, read.
        """
        notes, self._notes = self._notes, []
        failing = [note for note, value in zip(notes, flags, strict=True) if not value]
        for note in failing:
            if note.say is not None:
                note.say()
        return next((note.error() for note in failing if note.error is not None), None)


_OPEN: ContextVar[Gathered | None] = ContextVar("gathered", default=None)


@contextmanager
def gathered() -> Iterator[Gathered]:
    """Inside, looks at values on a device are noted down; whoever opens this reads and judges them."""
    own = Gathered()
    before = _OPEN.set(own)
    try:
        yield own
    finally:
        _OPEN.reset(before)


def check(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error, at once or when the checks are read, unless a condition holds.

    Args:
        holds: scalar bool; a comparison is false for NaN, too.
        error: makes the error; it may read values.
    """
    if not _noted(holds, error, None) and not holds:
        raise error()


def check_image(what: str, image: Tensor) -> None:
    """Refuse what is no image (B, 3, H, W) of float32 in [0, 1].

    Raises:
        ValueError: it is something else.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.dtype != torch.float32 or not image.numel():
        raise ValueError(f"{what}: expected float32 (B, 3, H, W), got {image.dtype} {tuple(image.shape)}")
    low, high = image.detach().aminmax()
    check(
        (low >= -RANGE_SLACK) & (high <= 1 + RANGE_SLACK),
        lambda: ValueError(f"{what}: expected values in [0, 1], got [{float(low):.3g}, {float(high):.3g}]"),
    )


def remark(holds: Tensor, say: Callable[[], object]) -> None:
    """Say something (a warning), at once or when the checks are read, unless a condition holds.

    Args:
        holds: scalar bool.
        say: is called; it may read values.
    """
    if not _noted(holds, None, say) and not holds:
        say()


def read(scalars: Sequence[Tensor | float]) -> list[float]:
    """The values of scalars, of which those on a device are read together, in float32."""
    away = [scalar.detach().float() for scalar in scalars if isinstance(scalar, Tensor) and scalar.device.type != "cpu"]
    values = iter(torch.stack(away).tolist() if away else [])
    return [
        next(values) if isinstance(scalar, Tensor) and scalar.device.type != "cpu" else float(scalar)
        for scalar in scalars
    ]


def _noted(holds: Tensor, error: Callable[[], Exception] | None, say: Callable[[], object] | None) -> bool:
    gathering = _OPEN.get()
    if gathering is None or holds.device.type == "cpu":
        return False
    gathering._notes.append(_Note(holds.float(), error, say))
    return True
