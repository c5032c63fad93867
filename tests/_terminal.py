"""A command on a real pseudo-terminal of so many columns, and what its screen showed."""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 240  # seconds that a process may take on a loaded machine
TOKEN = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|\x1b\[[\d;]*m|(\r|\n)|([^\x1b\r\n]+)")
BEGUN = re.compile(rb"(\x1b(\[[?\d;]*)?|[\xc0-\xff][\x80-\xbf]{0,1})?$")


class Terminal:
    """A process with a terminal of its own as stdin, stdout and stderr.

    Args:
        arguments: of the command, after the interpreter.
        columns: width.
        env: more variables.
        cwd: where it runs.

    Attributes:
        lines: what stands on the screen, from the top; scrolled off ones, too.
        frames: every text that a line has had, in order.
        cursor: whether it is shown.
    """

    def __init__(self, *arguments: str, columns: int = 80, env: dict[str, str] | None = None, cwd: Path | None = None):
        self.lines: list[str] = [""]
        self.frames: list[str] = []
        self.cursor = True
        self._row = self._column = 0
        self._rest = b""  # begun, and not yet whole: a letter or a sequence
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.chdir(cwd or ".")
            variables = {
                name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "RANK")
            }
            os.execve(sys.executable, [sys.executable, *arguments], variables | {"TERM": "xterm"} | (env or {}))

    def read(self, until: Callable[[], bool] = lambda: False, seconds: float = PATIENCE) -> float:
        """Take in output until `until` holds, or the process ends; how many seconds that took."""
        began = time.monotonic()
        os.set_blocking(self._fd, False)
        while not until():
            assert time.monotonic() - began < seconds, "\n".join(self.lines)
            try:
                got = os.read(self._fd, 65536)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:  # the other end is closed
                break
            if not got:
                break
            self._show(got)
        return time.monotonic() - began

    def shows(self, text: str) -> Callable[[], bool]:
        """Whether a line has, or had, this text."""
        return lambda: any(text in line for line in (*self.frames, *self.lines))

    def send(self, number: int) -> None:
        """A signal; of SIGINT as the terminal's own Ctrl-C."""
        if number == signal.SIGINT:
            os.write(self._fd, b"\x03")
        else:
            os.kill(self.pid, number)

    def end(self, seconds: float = PATIENCE) -> int:
        """Read to the end; its exit code (negative: the signal that killed it)."""
        self.read(seconds=seconds)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _show(self, got: bytes) -> None:
        got = self._rest + got
        whole = len(got) - len(BEGUN.search(got)[0])
        self._rest = got[whole:]
        for found in TOKEN.finditer(got[:whole].decode(errors="replace")):
            private, number, letter, control, plain = found.groups()
            if control == "\r":
                self._column = 0
            elif control == "\n":
                self._row += 1
            elif letter == "A":
                self._row = max(0, self._row - int(number or 1))
            elif letter == "K" and not private:
                self.lines[self._row] = ""
            elif private and number == "25":
                self.cursor = letter == "h"
            elif plain:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + plain + line[self._column + len(plain) :]
                self._column += len(plain)
                self.frames.append(self.lines[self._row])
            while len(self.lines) <= self._row:
                self.lines.append("")
