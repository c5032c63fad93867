"""What can be evaluated: a pipeline with a LoRA or without, bicubic enlargement, and images that are there already."""

import gc
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Batch
from rewardsr.data.folder import Data
from rewardsr.data.images import image_size, list_images, read_image
from rewardsr.data.items import centre
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.evaluation.conventions import Convention, to_levels
from rewardsr.evaluation.scoring import Maker
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.lora import full
from rewardsr.lora.layers import reference, scales, tuned
from rewardsr.pipelines import open_run
from rewardsr.storage import expand
from rewardsr.train.recipe import ProtocolRecipe


@dataclass(frozen=True)
class Wanted:
    """What every system is asked for.

    Attributes:
        convention: how outputs are finished.
        seed: of the noise: image i in draw d is seeded by (seed, d, i).
        scale: HQ is this many times LQ.
        device: where images are scored.
    """

    convention: Convention
    seed: int
    scale: int
    device: torch.device


@dataclass(frozen=True)
class Opened:
    """A system that is ready.

    Attributes:
        make: makes its images.
        adapter: the pipeline, where it is one.
        weights: hashes of what it computes with.
    """

    make: Maker
    adapter: ISRAdapter | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


class System(ABC):
    """Makes an image of every LQ image.

    Attributes:
        protocol: how its images are prompted; None: as those of all.
    """

    protocol: ProtocolRecipe | None = None

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What it is, as plain data for the file, before anything is loaded."""

    @abstractmethod
    def opened(self, wanted: Wanted) -> AbstractContextManager[Opened]:
        """The system, while the context lasts; errors are those of what it is made of."""

    def check(self, data: Data, limit: int | None, side: int | None) -> None:
        """Refuse, before any work, images that it cannot make.

        Raises:
            UserError: there are some.
        """


class Bicubic(System):
    """The LQ image enlarged, bicubic with antialiasing as PIL has it."""

    def described(self) -> dict[str, Any]:
        """As `System`."""
        return {"kind": "bicubic"}

    @contextmanager
    def opened(self, wanted: Wanted) -> Iterator[Opened]:
        """As `System`."""

        def make(batch: Batch, position: int, draw: int) -> Tensor:
            size = tuple(wanted.scale * length for length in batch.lq.shape[-2:])
            sr = nn.functional.interpolate(batch.lq, size=size, mode="bicubic", antialias=True).clamp(0, 1)
            return to_levels(sr, wanted.convention.enlarged)

        yield Opened(make)


class Images(System):
    """Images that any program has made, a file for each image of the data, found by its name without extension.

    They are scored as they are: colours are not fixed.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = expand(folder)
        self._files: dict[str, Path] = {}
        self._windows: dict[str, tuple[int, int, int, int]] = {}  # top, left, height and width of what is scored
        for path in list_images(self._folder):
            other = self._files.setdefault(path.stem, path)
            if other != path:
                raise UserError(f"'{other}' and '{path}' are of one name: keep one of them")

    def described(self) -> dict[str, Any]:
        """As `System`."""
        return {"kind": "images", "folder": str(self._folder)}

    def check(self, data: Data, limit: int | None, side: int | None) -> None:
        """As `System`: every image needs a file, of its size, whole or cut."""
        stems = [Path(str(item.shown)).stem for item in data.items[:limit]]
        missing = [stem for stem in stems if stem not in self._files]
        if missing:
            raise UserError(
                f"'{self._folder}' has no image for {len(missing)} of {len(stems)} images of the data "
                f"({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); names are compared without extensions"
            )
        for stem, item in zip(stems, data.items, strict=False):
            step = 1 if item.lq is None else data.scale
            cut, (all_of_it, whole) = (centre(item.size, data.scale, most, step) for most in (side, None))
            size = image_size(self._files[stem])
            corners = {item.size: cut[0], whole: _less(cut[0], all_of_it), cut[1]: (0, 0)}
            if size not in corners:
                raise UserError(
                    f"'{self._files[stem]}' is {size[1]}x{size[0]} pixels, expected {whole[1]}x{whole[0]}, as large as "
                    f"'{Path(str(item.shown)).name}'{'' if cut[1] == whole else f', or {cut[1][1]}x{cut[1][0]} of it'}"
                )
            self._windows[stem] = (*corners[size], *cut[1])

    @contextmanager
    def opened(self, wanted: Wanted) -> Iterator[Opened]:
        """As `System`."""

        def make(batch: Batch, position: int, draw: int) -> Tensor:
            stem = Path(batch.paths[0]).stem
            top, left, tall, wide = self._windows[stem]
            part = read_image(self._files[stem])[None, :, top : top + tall, left : left + wide]
            return part.to(wanted.device)

        digest = hashlib.sha256()
        for stem in self._windows:
            digest.update(self._files[stem].read_bytes())
        yield Opened(make, weights={"images": digest.hexdigest()})


@dataclass(frozen=True)
class Source:
    """Where a pipeline and its LoRA come from; fields as of `rewardsr.pipelines.open_run`.

    Attributes:
        key: what pipelines with the same networks and options have in common.
    """

    key: tuple[str, ...]
    run: str | None = None
    adapter: str = "osediff"
    base: str | None = None
    options: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    strength: float = 1.0


class Shelf:
    """Holds one pipeline at a time, with one LoRA: what is asked for next is made of it where that is possible.

    Args:
        device, precision, force_base: as of `rewardsr.pipelines.open_run`.
    """

    def __init__(self, device: str = "auto", precision: str | None = None, force_base: bool = False) -> None:
        self._options: dict[str, Any] = {"device": device, "precision": precision, "force_base": force_base}
        self._held: tuple[Source, ISRAdapter] | None = None

    def take(self, source: Source) -> ISRAdapter:
        """The pipeline with its LoRA on.

        Raises:
            UserError: as `open_run`.
        """
        if self._held is not None:
            held, adapter = self._held
            if held == source:
                return adapter
            alike = held.key == source.key and not full.names(adapter)
            if alike and replace(held, strength=source.strength) == source and tuned(adapter):
                lora.set_scale(adapter, source.strength)
                self._held = source, adapter
                return adapter
            del adapter
            self._held = None
            gc.collect()  # networks lie in circles of references; the next ones need the memory
        adapter, _ = open_run(
            source.run,
            source.adapter,
            source.base,
            source.options,
            source.loras,
            strength=source.strength,
            **self._options,
        )
        self._held = source, adapter
        return adapter


class Pipeline(System):
    """A pipeline with its LoRA, or its base.

    Args:
        take: gives the pipeline, with the LoRA on.
        base: the LoRA is off.
        about: what it is, as plain data for the file.
        key: see `Source`.
        protocol: how its images are prompted.
    """

    def __init__(
        self,
        take: Callable[[], ISRAdapter],
        *,
        base: bool = False,
        about: Mapping[str, Any] | None = None,
        key: object = None,
        protocol: ProtocolRecipe | None = None,
    ) -> None:
        self.take, self.base, self.key, self.protocol = take, base, key, protocol
        self._about = dict(about or {})

    def described(self) -> dict[str, Any]:
        """As `System`."""
        return {"kind": "base" if self.base else "pipeline", **self._about}

    @contextmanager
    def opened(self, wanted: Wanted) -> Iterator[Opened]:
        """As `System`."""
        adapter = self.take()

        def make(batch: Batch, position: int, draw: int) -> Tensor:
            source = Draws(wanted.seed, draw, [position], "evaluate")
            sr = upscale_tensor(adapter, batch, generator=source)
            return wanted.convention.finish(sr, adapter.upsample(batch.lq))

        with reference(adapter) if self.base else nullcontext():
            weights = {"base": _digest(adapter.base_model.fingerprint)}
            if not self.base and tuned(adapter):
                weights["lora"] = _digest(*_own_weights(adapter))
            yield Opened(make, adapter, weights)


def systems_of(adapter: ISRAdapter) -> dict[str, System]:
    """Base and tuned of a pipeline in memory; without a LoRA the base alone."""
    sides = {"base": True, "tuned": False} if tuned(adapter) else {"base": True}
    return {name: Pipeline(lambda: adapter, base=base, key=id(adapter)) for name, base in sides.items()}


def _less(corner: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return corner[0] - other[0], corner[1] - other[1]


def _own_weights(adapter: ISRAdapter) -> Iterator[str | Tensor]:
    """All that makes a tuned pipeline differ from its base, with the strength that it acts with."""
    if lora.attached(adapter):
        yield repr(sorted(scales(adapter).items()))
        for name, tensor in sorted(lora.state_dict(adapter).items()):
            yield from (name, tensor)
    for name, tensor in sorted(full.held(adapter).items()):
        yield from (name, tensor)


def _digest(*parts: str | Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
