"""Weights: written whole, and read without running code."""

import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rewardsr import progress
from rewardsr.errors import UserError, one_line
from rewardsr.json_object import LONGEST_NAME, read_object
from rewardsr.outline import sampled
from rewardsr.storage import write_bytes

_INDEX = "{}.safetensors.index.json"  # of weights in several files


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """`write_bytes` of tensors in safetensors format, with text metadata in the header."""
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, header))


def write_networks(networks: Mapping[str, Any], folder: Path) -> None:
    """Networks of diffusers, each in a folder of its name; to be called from `write_folder`.

    Raises:
        OSError: as any writing, also where safetensors has an error of its own for it.
    """
    sizes = {name: sum(tensor.nbytes for tensor in network.state_dict().values()) for name, network in networks.items()}
    with progress.bar("writing", sum(sizes.values()), unit="B") as advance:
        for name, network in networks.items():
            try:
                network.save_pretrained(folder / name)
            except SafetensorError as error:  # what a full disk looks like from inside safetensors
                raise OSError(f"{name}: {error}") from error
            advance(sizes[name])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header text of a safetensors file.

    Raises:
        UserError: no such file, or it is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in _names(path, file)}, dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"no file '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"'{path}' is damaged or not a safetensors file: {one_line(error)}") from error


def _names(path: Path, file: Any) -> list[str]:
    names = list(file.keys())
    for name in names:
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"'{path}' is damaged: {name[:LONGEST_NAME]!r} is no name of a tensor")
    return names


def variant_of(folder: Path, stem: str) -> str | None:
    """Which variant of a network's weights a folder holds ("fp16"), where it holds no plain ones; None: plain ones.

    Args:
        folder: as diffusers and transformers write networks.
        stem: what the names of weights begin with ("diffusion_pytorch_model").

    Raises:
        UserError: there are several, or none.
    """
    names = [path.name for path in folder.iterdir()]
    if {f"{stem}.safetensors", _INDEX.format(stem)} & set(names):
        return None
    named = re.compile(rf"{re.escape(stem)}\.(?:safetensors\.index\.([\w-]+)\.json|([\w-]+)\.safetensors)")
    found = {match[1] or match[2] for name in names if (match := named.fullmatch(name))}
    found = {variant for variant in found if not re.search(r"-\d+-of-\d+$", variant)}  # those are shards
    if len(found) > 1:
        raise UserError(f"'{folder}' holds several variants of its weights: keep one of {', '.join(sorted(found))}")
    if not found:
        raise UserError(f"'{folder}' holds no weights '{stem}.safetensors'")
    return found.pop()


def read_network(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a network's folder: of one safetensors file or of shards, plain or of the only variant there.

    Raises:
        UserError: as `variant_of`; or a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder, stem):
        tensors |= read_safetensors(file)[0]
    return tensors


def read_outline(folder: Path, stem: str) -> dict[str, Tensor]:
    """As `read_network`, but of names and shapes alone: tensors on the meta device, except those of `outline.sampled`.

    Of the files only the headers are read, and these tensors.

    Raises:
        UserError: as `read_network`.
    """
    tensors: dict[str, Tensor] = {}
    files = _files(folder, stem)
    for path in files:
        with _opened(path) as file:
            for name in _names(path, file):
                part = file.get_slice(name)
                kind = torch.int64 if part.get_dtype().startswith(("I", "U", "BOOL")) else torch.float32
                tensors[name] = torch.empty(part.get_shape(), dtype=kind, device="meta")
    wanted = sampled({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for path in files:
        with _opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name in wanted}  # noqa: SIM118
    return tensors


def _files(folder: Path, stem: str) -> list[Path]:
    """The files of a network's weights, whose index, where there are several, tells no lies."""
    variant = variant_of(folder, stem)
    index = folder / (_INDEX.format(stem) if variant is None else f"{stem}.safetensors.index.{variant}.json")
    if not index.is_file():
        return [folder / f"{stem}.{'' if variant is None else f'{variant}.'}safetensors"]
    places: Any = read_object(index).get("weight_map")
    files: list[Any] = list(places.values()) if isinstance(places, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f"'{index}' is damaged: expected files beside it, by tensor, as weight_map")
    found: set[str] = set()
    paths = [folder / file for file in sorted(set(files))]
    for path in paths:
        with _opened(path) as file:
            found |= set(_names(path, file))
    if found != places.keys():
        raise UserError(f"'{index}' and its files disagree about {min(found ^ places.keys())}")
    return paths


class _Counted(io.BufferedReader):
    """A file whose bytes are counted as they are read; torch reads those of its format before 1.6 past this."""

    def __init__(self, path: Path, advance: Callable[[int], object]) -> None:
        super().__init__(io.FileIO(path))
        self._advance = advance

    def read(self, size: int | None = -1) -> bytes:
        """As any file."""
        found = super().read(size)
        self._advance(len(found))
        return found

    def readinto(self, buffer: Any) -> int:
        """As any file."""
        count = super().readinto(buffer)
        self._advance(count)
        return count


def read_pickle(path: Path) -> Any:
    """A released torch pickle of tensors, lists and numbers; anything that would run code is refused.

    Raises:
        UserError: no such file, it is damaged, or it holds more than plain data.
    """
    if not path.is_file():
        raise UserError(f"no file '{path}'")
    bar = progress.bar(f"reading {path.name}", path.stat().st_size, unit="B")
    try:
        with bar as advance, _Counted(path, advance) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"'{path}' holds more than tensors (it could run code), or is damaged: refused") from error
    except Exception as error:  # of damaged bytes, any
        raise UserError(f"'{path}' is not a readable torch file: {one_line(error)}") from error
