"""Weights: written whole, and read without running code."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rewardsr.errors import UserError
from rewardsr.storage import write_bytes


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """`write_bytes` of tensors in safetensors format, with text metadata in the header."""
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, header))


def write_networks(networks: Mapping[str, Any], folder: Path) -> None:
    """Networks of diffusers, each in a folder of its name; to be called from `write_folder`.

    Raises:
        OSError: as any writing, also where safetensors has an error of its own for it.
    """
    for name, network in networks.items():
        try:
            network.save_pretrained(folder / name)
        except SafetensorError as error:  # what a full disk looks like from inside safetensors
            raise OSError(f"{name}: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header text of a safetensors file.

    Raises:
        UserError: no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"no file '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> Any:
    """A released torch pickle of tensors, lists and numbers; anything that would run code is refused.

    Raises:
        UserError: no such file, it is damaged, or it holds more than plain data.
    """
    if not path.is_file():
        raise UserError(f"no file '{path}'")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"'{path}' holds more than tensors (it could run code), or is damaged: refused") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # of an empty file: an EOFError without words
        raise UserError(f"'{path}' is not a readable torch file: {reason}") from error
