"""Which results `upscale` has left in a folder, and what they were made from: a later call keeps those of its own kind.

The record is a hidden file in the folder with a line a result: its name, a hash of what made it (pipeline, LoRAs and
their strength, seed, colour fix, and the image with its prompt and tensors), and a hash of the file. It does not change
the pictures, and a result that was replaced or cut short afterwards is not taken for one of ours.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.writing import Picture
from rewardsr.errors import UserError
from rewardsr.options import Options
from rewardsr.storage import short_name
from rewardsr.tiling import Tiling

FILE = ".upscale.jsonl"
CLAIM = ".upscale.lock"  # ends the names of claims, and of nothing else


class Record:
    """The record of one folder, for one pipeline as it is now.

    Args:
        folder: where the results are; need not be there yet.
        adapter: the pipeline.
        settings: what else decides the results, as text.
    """

    def __init__(self, folder: Path, adapter: ISRAdapter, *settings: str) -> None:
        self._path = folder / FILE
        self._settings = _digest(_pipeline(adapter), *settings)
        self._lines = self._read()
        self._before = {name: len(lines) for name, lines in self._lines.items()}

    def source(self, batch: Batch, picture: Picture) -> str:
        """Hash of what makes the result of a batch of one image, and of what its file passes on."""
        extras = [part for name in sorted(batch.extras) for part in (name, batch.extras[name])]
        alpha = b"" if picture.alpha is None else picture.alpha
        exif = b"" if picture.exif is None else picture.exif.tobytes()
        passed = (alpha, repr((picture.deep, picture.dpi)), picture.icc or b"", exif)
        return _digest(self._settings, batch.lq, repr(batch.prompts), *extras, *passed)

    @contextmanager
    def claimed(self, target: Path, wait: bool) -> Iterator[bool]:
        """Inside, no other process makes this result; False where one does now and `wait` is not set.

        The claim is a lock of the operating system on a hidden file, and ends with its process, however that ends.
        """
        lock = FileLock(target.with_name(f".{short_name(target.name)}{CLAIM}"), timeout=-1 if wait else 0)
        new = not target.parent.exists()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            raise UserError(f"cannot write '{lock.lock_file}': {error.strerror or error}") from error
        try:
            yield True
        finally:
            # Whoever waits for the old file looks for the result as soon as it has the lock.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            if new:  # and the image has failed
                with suppress(OSError):
                    target.parent.rmdir()

    def remove_claims(self) -> None:
        """Remove the claims that killed processes have left, whatever results they were of; what is held stays."""
        for path in self._path.parent.glob(f".*{CLAIM}"):
            # Whoever waits for a file that goes away takes the next one of its name.
            with suppress(OSError), FileLock(path, timeout=0):
                path.unlink(missing_ok=True)

    def made_meanwhile(self, target: Path) -> bool:
        """Whether another process has finished this result since the record was opened."""
        lines = self._read().get(target.name, [])
        if len(lines) <= self._before.get(target.name, 0) or not target.exists():
            return False
        return lines[-1][1] == _digest(target.read_bytes())

    def holds(self, target: Path, source: str) -> bool:
        """Whether the file is there, whole, and made from just this."""
        try:
            return self._lines.get(target.name, [None])[-1] == (source, _digest(target.read_bytes()))
        except OSError as error:
            raise UserError(f"cannot read '{target}': {error.strerror or error}") from error

    @contextmanager
    def noted(self, target: Path, source: str, content: bytes) -> Iterator[None]:
        """Note a result that is written inside: before it is there, so that a kill leaves none that is not known."""
        line = json.dumps({"name": target.name, "source": source, "content": _digest(content)})
        # It begins a line of its own, whatever a killed writer left.
        text = f"\n{line}\n".encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"cannot write '{self._path}': {error.strerror or error}") from error
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if self._path.stat().st_size == len(text):
                    self._path.unlink()
            raise

    def _read(self) -> dict[str, list[tuple[str, str]]]:
        """What was noted of each result, first to last."""
        found: dict[str, list[tuple[str, str]]] = {}
        try:
            lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        except OSError as error:
            raise UserError(f"cannot read '{self._path}': {error.strerror or error}") from error
        for line in lines:
            try:
                entry = json.loads(line)
                found.setdefault(str(entry["name"]), []).append((str(entry["source"]), str(entry["content"])))
            except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a kill, or not ours
                continue
        return found


def _pipeline(adapter: ISRAdapter) -> str:
    plain = bool | int | float | str | tuple | Options | Tiling | torch.dtype | None
    values = {name: repr(value) for name, value in sorted(vars(adapter).items()) if isinstance(value, plain)}
    kind = f"{type(adapter).__module__}.{type(adapter).__qualname__}"
    return _digest(kind, adapter.base_model.fingerprint, json.dumps(values), *_loras(adapter))


def _loras(adapter: ISRAdapter) -> list[str | Tensor]:
    """What the LoRAs that are on, with any strength, are made of."""
    parts: list[str | Tensor] = []
    for component, network in sorted(adapter.networks.items()):
        for name, module in network.named_modules():
            layer: Any = module
            if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
                continue
            for lora in layer.active_adapters:
                if lora in layer.lora_A and layer.scaling[lora]:
                    parts += [f"{component}.{name}: {layer.scaling[lora]!r}"]
                    parts += [layer.lora_A[lora].weight, layer.lora_B[lora].weight]
    return parts


def _digest(*parts: str | bytes | Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            tensor = part.detach().float().cpu().contiguous()
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        else:
            content = part.encode(errors="surrogateescape") if isinstance(part, str) else part
            digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()
