"""Errors that are the user's to mend, and hints at what was meant."""

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable

LONGEST = 480  # characters of an error line

# How torch and the libraries below it say it, where they raise no error of its own kind.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "status_alloc_failed")


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. The CLI prints it and exits with code 2."""

    def __str__(self) -> str:
        # Messages of other libraries have lines.
        return shortened(printable(re.sub(r"\s*[\n\r\t]\s*", " ", super().__str__())), LONGEST)


class TrainingError(RuntimeError):
    """Training cannot go on (numbers stopped being finite, say); what was reached so far has been kept."""


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: "did you mean 'x'?", else `otherwise`, or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(name[:80], known, n=1)
    return f"did you mean '{close[0]}'?" if close else otherwise or f"known: {', '.join(known) or 'none'}"


def one_line(error: BaseException) -> str:
    """What somebody else's error says, in one line of at most 200 characters, after its kind."""
    said = shortened(" ".join(str(error).split()), 200)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def printable(text: str, but: str = "") -> str:
    """A text for a terminal: what is not printable, `but` for these, becomes its escape (`\\n`, `\\x1b`, `\\udcff`).

    That covers control and escape sequences, and what turns the direction of writing around: whatever a prompt, a file
    name, a server or a file of somebody else says, it cannot steer a terminal, or hide in it.
    """
    return "".join(
        letter if letter.isprintable() or letter in but else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )


def shortened(text: str, most: int) -> str:
    """A text in at most so many characters: of a longer one the middle is left out."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def shown(value: object) -> str:
    """A value as Python writes it, in at most 80 characters, whatever its size."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother, brief.maxlong = 2, 80, 80, 60
    try:
        return shortened(brief.repr(value), 80)
    except ValueError:  # an integer of more digits than Python writes out
        return "a number of thousands of digits"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, on the CPU or on a device, was not enough for what was tried."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it may not be imported
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _NO_MEMORY)
