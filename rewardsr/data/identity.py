"""Telling the images of a run from others, without reading all of them."""

import hashlib
import os
from collections.abc import Iterable

from rewardsr.data.rows import Stored
from rewardsr.errors import UserError

BLOCK, BLOCKS = 4096, 4  # bytes; a file of up to BLOCK * BLOCKS is read whole


def identity_of(parts: Iterable[Stored | str | None]) -> str:
    """Hash of files (name, size, and blocks spread over the content), texts and gaps, in this order.

    Where the files lie and when they were written does not matter.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Stored):
            size, content = _sample(part)
            name = os.fsencode(part.name)
            digest.update(b"file %d %d %d " % (len(name), size, len(content)) + name + content)
        elif isinstance(part, str):
            text = part.encode()
            digest.update(b"text %d " % len(text) + text)
        else:
            digest.update(b"nothing ")
    return digest.hexdigest()


def _sample(path: Stored) -> tuple[int, bytes]:
    """Size in bytes, and blocks from the beginning to the very end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size <= BLOCK * BLOCKS:
                return size, file.read(BLOCK * BLOCKS)
            blocks = []
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                blocks.append(file.read(BLOCK))
            return size, b"".join(blocks)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
