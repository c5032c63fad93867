"""What reaches a terminal, and how a command ends: the only place of the package that prints.

Prompts, file names, answers of a server and files of other people go into messages; here whatever could steer a
terminal is written out.
"""

import errno
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import NoReturn

from rewardsr.errors import LONGEST, TrainingError, UserError, is_out_of_memory, printable, shortened

# The disk, its rights and names, wherever they are noticed: nothing is wrong with the program.
PLACE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}


def run(command: Callable[[], object]) -> None:
    """Run a command; the user's mistakes become one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer characters than file names have
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except TrainingError as error:
        _leave(f"training stopped: {error}", 1)
    except Exception as error:
        if is_out_of_memory(error):
            _leave("error: out of memory: smaller images, a tile, --precision bf16 or --device cpu need less", 2)
        if not isinstance(error, OSError) or error.errno not in PLACE_ERRORS:
            raise
        _leave(f"error: {error.strerror}: '{error.filename}'" if error.filename else f"error: {error.strerror}", 2)


def _leave(message: str, code: int) -> NoReturn:
    print(shortened(printable(" ".join(message.split())), LONGEST + 20), file=sys.stderr)
    sys.exit(code)


def say(text: object, err: bool = False) -> None:
    """Print lines. Where nobody reads them any more (`| head`), the work goes on."""
    try:
        # Not click's echo, which writes UTF-8 to a terminal that says it knows ASCII only.
        print(printable(str(text), but="\n"), file=sys.stderr if err else sys.stdout, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def columns() -> int | None:
    """How wide the terminal is that lines are printed to; None where they go elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


class Console(logging.Handler):
    """Messages of the package: warnings go to stderr, all others to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        warns = record.levelno >= logging.WARNING
        say(f"warning: {record.getMessage()}" if warns else record.getMessage(), err=warns)


def listen(logger: logging.Logger) -> None:
    """Show a logger's messages, once; of the processes of a launch one speaks."""
    if not any(isinstance(handler, Console) for handler in logger.handlers):
        logger.addHandler(Console())
    logger.setLevel(logging.INFO if speaks() else logging.ERROR)


def speaks() -> bool:
    """Whether this is the process of a launch that speaks: the first."""
    rank = os.environ.get("RANK", "")
    return not (rank.isdecimal() and int(rank[:9]))
