"""How far long work has come: live lines on a terminal, a plain line now and then elsewhere.

All goes to stderr, and from the first process of a launch only. What else is printed meanwhile appears above the lines.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from rewardsr import console
from rewardsr.errors import printable

SELDOM = 30.0  # seconds between plain lines, and before the first
PATIENCE = 1.0  # seconds before it is said what is being waited for
BRIEF = 0.3  # seconds; what is nested and takes less would only flicker
SHORTEST_BAR, LONGEST_BAR = 8, 24  # columns
PACE = 100  # a rate is taken over so many advances


class Advance(Protocol):
    """Tells a bar that `n` more are done.

    Args:
        n: how many.
        note: parts with two spaces between, shown as far as they fit.
        total: how many there are to do, where that has changed.
    """

    def __call__(self, n: int = 1, note: str = "", total: int | None = None) -> None: ...


@dataclass
class Work:
    """A piece of work, and how far it has come.

    Attributes:
        what: in a word or two.
        total: how many there are to do; None where something is waited for that cannot be counted.
        done: how many are.
        unit: "it", or "B": shown in MB.
        note: what else there is to tell.
    """

    what: str
    total: int | None
    done: int = 0
    unit: str = "it"
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)  # when a plain line was last printed
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE))  # times, how many were done then

    def __post_init__(self) -> None:
        self.start = self.done

    def advance(self, n: int, note: str) -> None:
        """Count `n` more."""
        self.done, self.note = self.done + n, note or self.note
        if n:
            self.pace.append((time.monotonic(), self.done))

    @property
    def rate(self) -> float | None:
        """How many a second of late; the first, which is often slower, counts while it is the only one."""
        if not self.pace:
            return None
        since, before = self.pace[0] if len(self.pace) > 1 else (self.began, self.start)
        return (self.done - before) / max(1e-9, self.pace[-1][0] - since)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take; None while there is no rate."""
        if self.total is None or not self.rate:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (time.monotonic() - self.pace[-1][0]))

    def line(self, width: int, full: str = "━", empty: str = "─") -> str:
        """All that fits into so many columns: first what, how far, how fast and how much longer, then the note."""
        if self.total is None:
            return _cut(f"{self.what} ... {clock(time.monotonic() - self.began)}", width)
        much = f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB" if self.unit == "B" else f"{self.done}/{self.total}"
        eta = f"ETA {'-:--:--' if self.left is None else clock(self.left)}"
        pace = [] if self.rate is None else [_speed(self.rate, self.unit)]
        line = "  ".join([f"{self.what} {much}", *pace, eta])
        if cell_len(line) > width:
            line = f"{_cut(self.what, max(8, width - len(f' {much}  {eta}')))} {much}  {eta}"
        for part in self.note.split("  "):
            if part and cell_len(line) + 2 + cell_len(part) <= width:
                line += f"  {part}"
        room = min(LONGEST_BAR, width - cell_len(line) - 2)
        if full and self.total and room >= SHORTEST_BAR:
            reached = min(room, room * self.done // self.total)
            line += f"  {full * reached}{empty * (room - reached)}"
        return _cut(line, width)


class _Display:
    """The lines of all work in hand, below each other; there while there is any."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._work: list[Work] = []
        self._live: Live | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now, drawn = time.monotonic(), ("#", "-") if options.ascii_only else ("━", "─")
        shown = [
            work
            for place, work in enumerate(list(self._work))
            if now - work.began >= (PATIENCE if work.total is None else BRIEF if place else 0)
        ]
        for work in shown:
            if work.total is not None or work is shown[-1]:  # a wait is told by what counts within it, if anything does
                yield Text(work.line(options.max_width, *drawn), no_wrap=True, overflow="crop")

    def add(self, work: Work) -> None:
        with self.lock:
            self._work.append(work)
            if self._live is None and on_terminal():
                # A pipe beside the terminal gets what is printed there as it is.
                both = sys.stdout.isatty()
                self._live = Live(
                    self, console=Console(stderr=True), transient=True, refresh_per_second=5, redirect_stdout=both
                )
                self._live.start(refresh=True)

    def remove(self, work: Work) -> None:
        with self.lock:
            self._work = [other for other in self._work if other is not work]
            if self._live is not None and not self._work:
                live, self._live = self._live, None
                live.stop()

    def in_hand(self, work: Work) -> bool:
        return any(other is work for other in self._work)


_display = _Display()


def on_terminal() -> bool:
    """Whether live lines can be shown."""
    where = Console(stderr=True)
    return where.is_terminal and not where.is_dumb_terminal


@contextmanager
def bar(
    what: str, total: int | None, *, done: int = 0, unit: str = "it", every: int | None = None
) -> Iterator[Advance]:
    """Show how far work has come while the context lasts; one within another shows below it.

    Without a terminal each prints a plain line when it advances and has printed none for 30 seconds: what takes less
    says nothing, and a long one within another speaks while the outer one stands still. Threads may advance it.

    Args:
        what: is done, in a word or two.
        total: how many there are to do; None: not known yet.
        done: how many are, already.
        unit: of the count, "it" or "B" (bytes).
        every: without a terminal a line after so many, instead of by the clock.

    Returns:
        What to call after each: `advance(n=1, note="")`.
    """
    if not console.speaks():
        yield lambda n=1, note="", total=None: None
        return
    work = Work(printable(what), total, done, unit)

    def advance(n: int = 1, note: str = "", total: int | None = None) -> None:
        with _display.lock:
            before, now = work.done, time.monotonic()
            work.total = work.total if total is None else total
            work.advance(n, printable(note))
            due = now - work.said >= SELDOM if every is None else work.done // every > before // every
            if due and not on_terminal() and _display.in_hand(work):  # a library may count on when all is over
                work.said = now
                console.say(work.line(10_000, full=""), err=True)

    try:  # a signal may come while the lines begin
        _display.add(work)
        yield advance
    finally:
        _display.remove(work)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is being waited for, with the time on a terminal, if it takes more than a second."""
    if not console.speaks():
        yield
        return
    work = Work(printable(what), None)
    timer = None
    if not on_terminal():
        timer = threading.Timer(PATIENCE, console.say, (f"{work.what} ...", True))
        timer.daemon = True
        timer.start()
    try:
        _display.add(work)
        yield
    finally:
        if timer is not None:
            timer.cancel()
        _display.remove(work)


def _speed(rate: float, unit: str) -> str:
    if unit == "B":
        return f"{rate / 1e6:.1f} MB/s"
    if rate >= 9.95:
        return f"{rate:.0f} it/s"
    if rate >= 0.95:
        return f"{rate:.1f} it/s"
    return f"{1 / rate:.1f} s/it" if rate > 0.1 else f"{1 / rate:.0f} s/it"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width)).rstrip()
