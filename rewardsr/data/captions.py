"""Prompts that a captioner writes for images that bring none: the plug-in group `captioners`.

A captioner is a function `(lq (B, 3, h, w) in [0, 1]) -> list[str]`, or a class that makes such an object: as
`Kind(options)` where it declares `Options` (a subclass of `rewardsr.Options`), else as `Kind()`. `module:Name` names
it, or an entry point of the group rewardsr.captioners; `rewardsr.data.captioners` has the built-in ones. Texts are kept
on the disk (in `$REWARDSR_CACHE/captions`, by default in `rewardsr/` of the user's cache) where the captioner has an
attribute `identity`: a text that differs as soon as it may say anything else (other weights, other options).
"""

import hashlib
import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rewardsr.data.items import MANY_EMPTY
from rewardsr.data.sidecars import LONGEST, with_suffix
from rewardsr.errors import UserError, is_out_of_memory, one_line
from rewardsr.options import Options, parse
from rewardsr.plugins import resolve
from rewardsr.storage import check_folder, expand, read_text, write_text

KEPT = 100_000  # texts in memory
JUDGED = 10  # texts, before their share of empty ones says something

logger = logging.getLogger(__name__)


class Captions:
    """A captioner by name, asked once for every image.

    It sees one image at a time: the text of an image then does not depend on the batch, and two processes agree with
    one. It is called without gradients, on images that lie on the CPU.

    Args:
        name: registered name, or `module:Name`.
        options: of the captioner.
        suffix: follows each text after a comma.

    Raises:
        UserError: no such captioner or option, it cannot be made, or the cache cannot be written to.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None, suffix: str = "") -> None:
        self._name, self._suffix = name, suffix
        self._captioner = _made(name, options or {})
        self._texts: dict[bytes, str] = {}
        self._empty, self._said = 0, False
        self._lock = Lock()  # threads that work ahead ask, too
        self._folder: Path | None = None
        identity = getattr(self._captioner, "identity", None)
        if identity is not None:
            self._folder = _cache() / hashlib.blake2b(f"{name} {identity}".encode(), digest_size=16).hexdigest()
            try:
                check_folder(self._folder)
            except UserError as error:
                raise UserError(f"texts of captioner '{name}' cannot be kept (REWARDSR_CACHE): {error}") from error

    def __call__(self, images: Tensor, keep: bool = False) -> tuple[str, ...]:
        """One text for each of the images (B, 3, h, w) in [0, 1].

        Args:
            images: LQ images, or HQ ones.
            keep: they will be asked for again, in other runs too: their texts may go to the disk.

        Raises:
            UserError: the captioner fails, or gives something else than a list of one text.
        """
        with self._lock:
            return tuple(with_suffix(self._text(image, keep), self._suffix) for image in images.split(1))

    def _text(self, image: Tensor, keep: bool) -> str:
        digest = hashlib.blake2b(image.numpy().tobytes() + repr(image.shape).encode(), digest_size=16)
        key, file = digest.digest(), None
        if key not in self._texts:
            if len(self._texts) == KEPT:
                self._texts.pop(next(iter(self._texts)))
            if keep and self._folder is not None:
                file = self._folder / f"{digest.hexdigest()}.txt"
            if file is not None and file.is_file():
                self._texts[key] = read_text(file, f"caption '{file}'", 4 * LONGEST)
            else:
                self._texts[key] = self._written(image)
                if file is not None:
                    write_text(file, self._texts[key])
            self._count(self._texts[key])
        return self._texts[key]

    def _written(self, image: Tensor) -> str:
        """What the captioner says."""
        try:
            with torch.no_grad():
                texts = self._captioner(image)
        except Exception as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise UserError(f"captioner '{self._name}' fails: {one_line(error)}") from error
        if not isinstance(texts, list | tuple) or len(texts) != 1 or not isinstance(texts[0], str):
            raise UserError(f"captioner '{self._name}' gave {texts!r:.80} for one image, expected [text]")
        return " ".join(texts[0][:LONGEST].split())

    def _count(self, text: str) -> None:
        """Warn once where many texts are empty."""
        self._empty += not text
        if not self._said and self._empty > MANY_EMPTY * max(JUDGED, len(self._texts)):
            logger.warning("captioner '%s': %d of %d texts are empty", self._name, self._empty, len(self._texts))
            self._said = True


def _made(name: str, options: Mapping[str, Any]) -> Any:
    kind = resolve("captioners", name)
    declared = getattr(kind, "Options", None)
    if declared is not None and not (inspect.isclass(declared) and issubclass(declared, Options)):
        raise UserError(f"captioner '{name}': declare its Options as a subclass of rewardsr.Options")
    given = parse(declared or Options, options, f"data.captioner_options ({name})")
    try:
        made = kind(*((given,) if declared else ())) if inspect.isclass(kind) else kind
    except UserError:
        raise
    except Exception as error:  # a captioner may be a stranger's
        if is_out_of_memory(error):
            raise
        raise UserError(f"captioner '{name}' cannot be made: {one_line(error)}") from error
    if not callable(made):
        raise UserError(f"captioner '{name}': expected a function of images, got {type(made).__name__}")
    return made


def _cache() -> Path:
    """Where texts are kept: a cache belongs to a machine, not to a run, so that no recipe names it."""
    chosen = os.environ.get("REWARDSR_CACHE")
    base = expand(chosen) if chosen else expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rewardsr"
    return base / "captions"
