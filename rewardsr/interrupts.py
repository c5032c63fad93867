"""Ctrl-C and SIGTERM: answered at once, by finishing what is under way, or by ending with a word of what is kept.

Python runs a handler once the main thread is back from whatever library it is in, which may be seconds later. So the
answer comes from a thread, which the system wakes as soon as there is a signal.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rewardsr import console
from rewardsr.errors import TrainingError

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds that a command may take to end, once it is to quit


class Interrupted(SystemExit):
    """A signal ends the command; its notes say what is kept. Not a KeyboardInterrupt: typer reports that itself."""


class StoppedError(TrainingError):
    """What was under way was left off for a signal."""


class Stop:
    """Whether to stop; the first signal of each kind sets it, a second one quits.

    Attributes:
        says: what the first is answered.
    """

    def __init__(self, says: str) -> None:
        self.says = says
        self.heard: set[int] = set()  # by the thread, which answers
        self.received: set[int] = set()  # by the main thread, which stops

    def __call__(self) -> bool:
        """Whether there was a signal."""
        return bool(self.received)

    def check(self) -> None:
        """Leave off here if there was one.

        Raises:
            StoppedError: there was.
        """
        if self.received:
            raise StoppedError("stopped by a signal")

    @contextmanager
    def saying(self, says: str) -> Iterator[None]:
        """Another answer for a while."""
        before, self.says = self.says, says
        try:
            yield
        finally:
            self.says = before


class _Signals:
    """The handlers of this process, set while there is something to finish or to end."""

    def __init__(self) -> None:
        self.stops: list[Stop] = []
        self.ends_command = False
        self._previous: dict[int, Any] = {}
        self._over = threading.Event()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Set them, unless they are. Not in a thread (a notebook's, say), where Python sets none."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._over.clear()
        self._previous = {number: signal.signal(number, self._receive) for number in NUMBERS}
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(ours,), name="rewardsr-signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}
            self._over.set()
            theirs.close()  # which ends the thread
            thread.join()
            ours.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        if self.stops and number not in self.stops[-1].received:
            self.stops[-1].received.add(number)
            return
        previous = self._previous[number]
        for each in NUMBERS:  # one more ends the process whatever it is at
            signal.signal(each, signal.SIG_DFL)
        if self.ends_command:
            raise Interrupted(128 + number)
        if callable(previous):
            previous(number, frame)
        else:
            os.kill(os.getpid(), number)

    def _listen(self, ours: socket.socket) -> None:
        """The thread: answers what comes, a byte a signal."""
        while came := ours.recv(1):
            number, stop = came[0], self.stops[-1] if self.stops else None
            if number not in NUMBERS:
                continue
            if stop is not None and number not in stop.heard:
                if not stop.heard:  # launchers send SIGTERM after the terminal's SIGINT
                    _say(stop.says)
                stop.heard.add(number)
            elif self.ends_command:
                threading.Thread(target=self._see_to_the_end, args=(number,), daemon=True).start()

    def _see_to_the_end(self, number: int) -> None:
        """End a command that a library does not let end; files are written whole or not at all."""
        if not self._over.wait(GRACE):
            _say("interrupted")
            _show_cursor()
            os._exit(128 + number)


_signals = _Signals()


@contextmanager
def ending() -> Iterator[None]:
    """A command: a signal ends it, with one line, exit code 128 + number, and within seconds whatever it is at."""
    with _signals.handled():
        _signals.ends_command = True
        try:
            yield
        except Interrupted as error:
            _show_cursor()
            _say(": ".join(["interrupted", *getattr(error, "__notes__", [])[:1]]))
            sys.exit(error.code)
        finally:
            _signals.ends_command = False


@contextmanager
def finishing(stop: Stop) -> Iterator[None]:
    """Work in pieces that are to be finished: the first signal is answered, and sets `stop`; a second one quits."""
    with _signals.handled():
        _signals.stops.append(stop)
        try:
            yield
        finally:
            _signals.stops.remove(stop)


@contextmanager
def keeping(what: str | Callable[[], str]) -> Iterator[None]:
    """Where a signal ends the command inside, it says `what` is kept; serves as a decorator, too."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        error.add_note(what if isinstance(what, str) else what())
        raise


def _show_cursor() -> None:
    """Live lines hide it, and may have been cut off in the middle of showing it again."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")


def _say(text: str) -> None:
    if console.speaks():
        console.say(text, err=True)
