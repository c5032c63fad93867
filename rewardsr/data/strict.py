"""What reading an image changes for the whole process, and only while some thread reads: PIL's switches, and stderr."""

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

from PIL import Image, ImageFile

from rewardsr.errors import UserError, is_out_of_memory

_switches, _stderr = Lock(), Lock()
_readers: list[bool] = []  # one entry for each thread that reads: PIL's switch as it was before
_NO_REMARKS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings` keeps it


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turns what goes wrong while `what` is read into one line, and refuses truncated and huge files."""
    with _strict():
        try:
            yield
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            limit = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
            raise UserError(
                f"cannot read '{what}': more than {limit} pixels, PIL's safety limit; cut it into parts"
            ) from error
        except PermissionError as error:
            raise UserError(f"cannot read '{what}': no permission") from error
        except Image.UnidentifiedImageError as error:
            raise UserError(f"cannot read '{what}': not an image, or damaged at its beginning") from error
        except Exception as error:  # decoders raise whatever they stumble over in a damaged file
            if is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"cannot read '{what}': damaged, truncated or of an unknown kind ({reason})") from error


@contextmanager
def _strict() -> Iterator[None]:
    """While any thread is inside, PIL refuses truncated files, and keeps its remarks on metadata to itself.

    The first that comes sees to both, the last that leaves undoes it. The filters of warnings are not put back as a
    whole, which would undo what other threads do to theirs in the meantime.
    """
    with _switches:
        _readers.append(_readers[0] if _readers else ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global switch that some packages turn on when they are imported
        if _NO_REMARKS not in warnings.filters:
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _switches:
            before = _readers.pop()
            if not _readers:
                ImageFile.LOAD_TRUNCATED_IMAGES = before
                filters: Any = warnings.filters  # perhaps another list than before: other threads may change it
                with suppress(ValueError):
                    filters.remove(_NO_REMARKS)


def check_pixels(image: Image.Image) -> None:
    """PIL itself refuses twice the limit, and only warns of less."""
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keeps what libtiff and libpng print of a file that cannot be read off stderr: one line says it all.

    Stderr is the process's: one thread at a time.
    """
    with _stderr:
        yield from _diverted()


def _diverted() -> Iterator[None]:
    try:
        stderr, kept = os.dup(2), os.memfd_create("remarks")
    except (OSError, AttributeError):  # there is no stderr, or no such file in memory on this system
        yield
        return
    os.dup2(kept, 2)
    try:
        yield
    except BaseException:
        os.ftruncate(kept, 0)
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        with os.fdopen(kept, "rb") as file:
            file.seek(0)
            os.write(2, file.read())  # of a file that is read; and another thread may have said something
