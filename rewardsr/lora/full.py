"""Weights of the base that are trained themselves, beside a LoRA or without one.

They are switched with the LoRA named "rewardsr": where that is off, a network has the weights that it began with. A
file holds them by component and name (`unet.conv_in.weight`), in float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.errors import UserError
from rewardsr.json_object import parse_object
from rewardsr.lora.pairs import floats
from rewardsr.run_folder import OUR_HEADER
from rewardsr.weights import read_safetensors, write_safetensors


@dataclass(frozen=True)
class _Held:
    parameter: nn.Parameter
    start: Tensor


# By network: its weights that are not those of the base any more, or are being trained.
_HELD: WeakKeyDictionary[nn.Module, dict[str, _Held]] = WeakKeyDictionary()


def train_in_full(adapter: ISRAdapter, place: str) -> dict[str, nn.Parameter]:
    """Let the weights of a network, or of a part of one, be trained themselves, in float32.

    A part of a network in another precision then computes in float32, and gives back the network's; a network that is
    trained as a whole computes in float32 from then on. LoRAs on it are not among its weights.

    Args:
        adapter: the pipeline.
        place: component ("unet"), or component and module ("unet.conv_in"), whose inputs are tensors then.

    Returns:
        The weights by component and name, for a `ParameterGroup`.

    Raises:
        UserError: there is no such place, or it has no weights.
    """
    component, _, path = place.partition(".")
    try:
        module = adapter.networks[component].get_submodule(path)
    except (KeyError, AttributeError) as error:
        raise UserError(f"adapter '{adapter.name}' has no '{place}' to train in full") from error
    found = {name: value for name, value in _weights(adapter.networks[component]).items() if _inside(name, path)}
    if not found:
        raise UserError(f"'{place}' of adapter '{adapter.name}' has no weights to train in full")
    precision = next(iter(found.values())).dtype
    for name, parameter in found.items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        _hold(adapter.networks[component], name, parameter)
    if path and precision != torch.float32:
        module.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))
        module.register_forward_hook(lambda _module, _inputs, output: output.to(precision))
    return {f"{component}.{name}": parameter for name, parameter in found.items()}


def names(adapter: ISRAdapter) -> list[str]:
    """The weights that were or are trained in full, by component and name, sorted."""
    return sorted(f"{component}.{name}" for component, name, _ in _entries(adapter))


@contextmanager
def off(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, they are what they were in the base. Never back-propagate inside, or later what was computed inside."""
    entries = [held for _, _, held in _entries(adapter)]
    trained = [held.parameter.data for held in entries]
    try:
        for held, own in zip(entries, trained, strict=True):
            held.parameter.data = held.start.to(own)
        yield
    finally:
        for held, own in zip(entries, trained, strict=True):
            held.parameter.data = own


def settle(adapter: ISRAdapter) -> None:
    """Let them be the base's from now on."""
    for network in adapter.networks.values():
        _HELD.pop(network, None)


def held(adapter: ISRAdapter) -> dict[str, Tensor]:
    """These weights by component and name, float32 on the CPU."""
    return {f"{component}.{name}": one.parameter.detach().float().cpu() for component, name, one in _entries(adapter)}


def save(adapter: ISRAdapter, path: Path, about: Mapping[str, Any]) -> None:
    """Write them to a file.

    Args:
        adapter: that has some.
        path: of the file.
        about: the pipeline that they belong to, as in a LoRA's header.
    """
    write_safetensors(path, held(adapter), {OUR_HEADER: json.dumps(about, sort_keys=True), "format": "pt"})


def load(adapter: ISRAdapter, path: Path, scale: float, check_base: Callable[[BaseModel], None]) -> None:
    """Put the weights of a file into the pipeline.

    Args:
        adapter: the pipeline that they were trained on.
        path: of the file.
        scale: strength: how much of the way from the base's weights to these.
        check_base: refuses another base than the file's.

    Raises:
        UserError: the file is missing or damaged, of another base, or does not fit; nothing has been changed then.
    """
    tensors, header = read_safetensors(path)
    try:
        base = BaseModel(**parse_object(header[OUR_HEADER], f"'{path}'")["base"])
    except (KeyError, TypeError) as error:
        raise UserError(f"'{path}' does not say which base it belongs to: not written by rewardsr") from error
    check_base(base)
    own = {
        f"{component}.{name}": value
        for component in adapter.networks
        for name, value in _weights(adapter.networks[component]).items()
    }
    for key, tensor in tensors.items():
        if key not in own or own[key].shape != tensor.shape:
            here = f"{tuple(own[key].shape)} here" if key in own else "no weight here"
            raise UserError(f"'{path}' does not fit this pipeline: {key} is {tuple(tensor.shape)}, and {here}")
        floats(f"'{path}': {key}", tensor)
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        start = _hold(adapter.networks[component], name, own[key]).start
        tensor = tensor.to(start.device)
        with torch.no_grad():
            own[key].copy_(tensor if scale == 1 else start.float() + scale * (tensor - start.float()))


def _entries(adapter: ISRAdapter) -> Iterator[tuple[str, str, _Held]]:
    for component, network in adapter.networks.items():
        for name, held in _HELD.get(network, {}).items():
            yield component, name, held


def _hold(network: nn.Module, name: str, parameter: nn.Parameter) -> _Held:
    """Keep what a weight is before it is changed for the first time."""
    held = _HELD.setdefault(network, {})
    if name not in held:
        held[name] = _Held(parameter, parameter.detach().clone())
    return held[name]


def _weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the base by name, as they are called without LoRAs."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    }


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")
