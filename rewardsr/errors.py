"""Errors that are the user's to mend, and hints at what was meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. The CLI prints it and exits with code 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (numbers stopped being finite, say); what was reached so far has been kept."""


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown name: "did you mean 'x'?", else `otherwise`, or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else otherwise or f"known: {', '.join(known) or 'none'}"


def one_line(error: BaseException) -> str:
    """What somebody else's error says, in one line of at most 200 characters, after its kind."""
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
