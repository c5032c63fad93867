"""Prompts that a captioner writes for images that bring none: the plug-in group `captioners`.

No captioner comes with rewardsr. One is a function `(lq (B, 3, h, w) in [0, 1]) -> list[str]`, or a class without
arguments that makes such an object; `module:Name` names it, or an entry point of the group rewardsr.captioners.
"""

import hashlib
import inspect
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rewardsr.errors import UserError, is_out_of_memory, one_line
from rewardsr.plugins import resolve

KEPT = 100_000  # texts


class Captions:
    """A captioner by name, asked once for every image.

    It sees one image at a time: the text of an image then does not depend on the batch, and two processes agree with
    one. It is called without gradients, on images that lie on the CPU.

    Args:
        name: registered name, or `module:Name`.

    Raises:
        UserError: no such captioner, or it cannot be made.
    """

    def __init__(self, name: str) -> None:
        made = resolve("captioners", name)
        try:
            self._captioner: Any = made() if inspect.isclass(made) else made
        except Exception as error:  # a captioner may be a stranger's
            raise UserError(f"captioner '{name}' cannot be made: {one_line(error)}") from error
        if not callable(self._captioner):
            raise UserError(f"captioner '{name}': expected a function of images, got {type(self._captioner).__name__}")
        self._name = name
        self._texts: dict[bytes, str] = {}
        self._lock = Lock()  # threads that work ahead ask, too

    def __call__(self, lq: Tensor) -> tuple[str, ...]:
        """One text for each of the images (B, 3, h, w) in [0, 1].

        Raises:
            UserError: the captioner fails, or gives something else than a list of one text.
        """
        with self._lock:
            return tuple(self._text(image) for image in lq.split(1))

    def _text(self, image: Tensor) -> str:
        key = hashlib.blake2b(image.numpy().tobytes() + repr(image.shape).encode(), digest_size=16).digest()
        if key not in self._texts:
            try:
                with torch.no_grad():
                    texts = self._captioner(image)
            except Exception as error:
                if isinstance(error, UserError) or is_out_of_memory(error):
                    raise
                raise UserError(f"captioner '{self._name}' fails: {one_line(error)}") from error
            if not isinstance(texts, list | tuple) or len(texts) != 1 or not isinstance(texts[0], str):
                raise UserError(f"captioner '{self._name}' gave {texts!r:.80} for one image, expected [text]")
            if len(self._texts) == KEPT:
                self._texts.pop(next(iter(self._texts)))
            self._texts[key] = " ".join(texts[0].split())
        return self._texts[key]
