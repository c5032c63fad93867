"""Paths as users write them, and writing so that nothing is ever half-written."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewardsr.errors import UserError

_LONGEST = 200  # bytes of a name within a temporary one; file systems take 255 in all
_SHOWN = 100  # characters of a path in a message about it


def expand(path: Path | str) -> Path:
    """A path that a user gave, with `~` and `~name` replaced by home folders; a relative one stays relative.

    Raises:
        UserError: the text is empty, there is no such home folder, or no file system takes the name.
    """
    if not str(path):
        raise UserError("a path is empty: name a file or folder")
    shown = f"'{path}'" if len(str(path)) <= _SHOWN else f"'{str(path)[:_SHOWN]}...'"
    try:
        full = Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):
            return Path(path)
        raise UserError(f"{shown}: there is no home folder of {Path(path).parts[0]}: write the whole path") from error
    for part in map(str, (full, *full.parts)):
        try:
            os.lstat(part)
        except ValueError as error:  # a NUL, or half of a surrogate pair
            raise UserError(f"{shown} holds a character that no file name can hold") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{shown} is too long for a file name: choose a shorter one") from error
    return full


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
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with _held(path, temporary, lambda: os.open(temporary, flags, 0o666)) as descriptor:
            try:
                with os.fdopen(os.dup(descriptor), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


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
    temporary = _temporary(path)

    def opened() -> int:
        temporary.mkdir(parents=True, exist_ok=True)
        return os.open(temporary, os.O_RDONLY)

    try:
        with _held(path, temporary, opened):
            try:
                fill(temporary)
                if replace and path.exists():
                    shutil.rmtree(path)
                temporary.replace(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error


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
    pattern = re.compile(r"\.%s\.\d+(-\d+)?\.tmp" % (".+" if name is None else re.escape(_short(name))))
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
            with suppress(OSError), _locked(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.{os.getpid()}-{threading.get_native_id()}.tmp")


def _short(name: str) -> str:
    """A name that leaves room for what a temporary one has besides."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.blake2b(encoded, digest_size=8).hexdigest()


@contextmanager
def _held(path: Path, temporary: Path, opened: Callable[[], int]) -> Iterator[int]:
    """The locked descriptor of a temporary file or folder: that tells others that its writer lives."""
    remove_own_leftovers(path.parent, path.name)
    while True:
        with _locked(opened(), fcntl.LOCK_EX) as descriptor:
            if not _is_at(descriptor, temporary):  # somebody took it for a leftover before it was locked
                continue
            yield descriptor
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(descriptor: int, how: int) -> Iterator[int]:
    """Locked until the descriptor is closed, at the latest when the process dies."""
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
                raise
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
