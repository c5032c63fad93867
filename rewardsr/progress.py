"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rewardsr import console

_SECONDS = 30.0  # between two lines where there is no terminal
_QUIET = os.environ.get("RANK", "0") != "0"  # of the processes of a launch one speaks
_open: list[Progress] = []


class Advance(Protocol):
    """Says that so much more is done."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


@contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """Show how many of `total` are done; bars inside of others stand below them."""
    if _QUIET or not sys.stderr.isatty():
        yield _lines(what, total)
        return
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(), BarColumn())
    shown = _open[0] if _open else Progress(*columns, console=Console(stderr=True), transient=True)
    if not _open:
        shown.start()
    _open.append(shown)
    task = shown.add_task(what, total=total)
    try:
        yield lambda n=1, note="": shown.update(task, advance=n, description=f"{what} {note}".strip())
    finally:
        shown.remove_task(task)
        _open.pop()
        if not _open:
            shown.stop()


def _lines(what: str, total: int) -> Advance:
    done, last = 0, time.monotonic()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        if not _QUIET and time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            console.say(f"{what} {done}/{total} {note}".strip())

    return advance
