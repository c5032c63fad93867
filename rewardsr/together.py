"""What the processes of a launch tell each other: a failure in one of them ends all, with its message."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from rewardsr.errors import TrainingError, UserError

T = TypeVar("T")


def everywhere(accelerator: Accelerator | None, work: Callable[[], T]) -> list[T]:
    """What `work` returns in every process; where it fails in one, all of them raise, and none waits for ever.

    Args:
        accelerator: the processes; None: this one alone.
        work: every process calls this with work of its own.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [work()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    gathered: list[tuple[T, Exception | None]] = gather_object([(result, _portable(failure))])
    _raise_first(failure, [told for _, told in gathered])
    return [result for result, _ in gathered]


def raise_everywhere(failure: Exception | None) -> None:
    """Called by all processes once they know that one of them has failed: each raises its failure, or another's."""
    _raise_first(failure, gather_object([_portable(failure)]))


def _portable(failure: Exception | None) -> Exception | None:
    if failure is None or isinstance(failure, UserError | TrainingError):
        return failure
    return TrainingError(f"{type(failure).__name__}: {failure}")  # others may not survive pickling


def _raise_first(own: Exception | None, others: list[Exception | None]) -> None:
    for raised in (own, *others):
        if raised is not None:
            raise raised
