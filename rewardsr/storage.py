"""Paths as users write them, and writing so that nothing is ever half-written."""

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from rewardsr.errors import UserError, shown

_LONGEST = 200  # bytes of a name within that of another file; file systems take 255 in all
# Part of the names of temporary files: the numbers of processes are a host's own.
_HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def expand(path: Path | str) -> Path:
    """A path that a user gave, with `~` and `~name` replaced by home folders; a relative one stays relative.

    Raises:
        UserError: the text is empty, there is no such home folder, or no file system takes the name.
    """
    if not str(path):
        raise UserError("a path is empty: name a file or folder")
    said = shown(str(path))
    try:
        full = Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):
            return Path(path)
        raise UserError(f"{said}: there is no home folder of {Path(path).parts[0]}: write the whole path") from error
    for part in map(str, (full, *full.parts)):
        try:
            os.lstat(part)
        except ValueError as error:  # a NUL, or half of a surrogate pair
            raise UserError(f"{said} holds a character that no file name can hold") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{said} is too long for a file name: choose a shorter one") from error
    return full


def read_bytes(path: Path, what: str, most: int) -> bytes:
    """A file of at most so many bytes; never more of it is read, and nothing of what does not end.

    Raises:
        UserError: no such file, no regular one (a pipe or a device may go on for ever), or a larger one; the message
            begins with `what`.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening the latter says so
            raise UserError(f"{what} is a pipe or a device, expected a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error
    if len(content) > most:
        raise UserError(f"{what} is larger than {most:,d} bytes: that is not one")
    return content


def read_text(path: Path, what: str, most: int = 2**20) -> str:
    """`read_bytes` of UTF-8 text.

    Raises:
        UserError: as `read_bytes`; or it is something else.
    """
    try:
        return read_bytes(path, what, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not a text file (UTF-8)") from error


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, as far as it shows without writing: before long work.

    Raises:
        UserError: a file is in the way, or there is no permission.
    """
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"output '{path}': '{there}' is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output '{path}': no permission to write in '{there}'")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: to a temporary name beside it, flushed to the disk, then renamed.

    Raises:
        UserError: the disk is full, or the place cannot be written to; what was there before is still there.
    """
    remove_own_leftovers(path.parent, path.name)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode())


def write_folder(path: Path, fill: Callable[[Path], None], replace: bool = False) -> None:
    """Write a folder in one step: `fill` gets a temporary folder beside `path`, which is then renamed.

    Args:
        path: the folder.
        fill: writes into the folder that it is given.
        replace: remove an earlier folder at `path` once the new one is complete.

    Raises:
        UserError: the disk is full, or the place cannot be written to; nothing is left behind.
    """
    remove_own_leftovers(path.parent, path.name)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        if replace and path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def short_name(name: str) -> str:
    """A file's name where there is room beside it in the name of another file; else a hash of it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.blake2b(encoded, digest_size=8).hexdigest()


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file or folder of the functions above; they stay where a writer was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in and below a folder that is all ours, as a run's is."""
    for path in [path for path in folder.rglob("*") if is_leftover(path)]:
        _remove(path)


def remove_own_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder that others use, too; what a writer still works on stays.

    Args:
        folder: where they wrote.
        name: only those of this file or folder.
    """
    of = ".+" if name is None else re.escape(short_name(name))
    pattern = re.compile(rf"\.{of}\.{_HOST}-(\d+)-\d+\.tmp")
    with suppress(OSError):
        for entry in os.listdir(folder):  # of names alone: a folder of results is listed for each of them
            match = pattern.fullmatch(entry) if entry.endswith(".tmp") else None
            if match is not None and not psutil.pid_exists(int(match[1])):
                _remove(folder / entry)


def _temporary(path: Path) -> Path:
    """A name of this writer's own, which tells others whose it is."""
    return path.with_name(f".{short_name(path.name)}.{_HOST}-{os.getpid()}-{threading.get_native_id()}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
