"""Arguments and results of operations, of which some are tensors of the fake device and some of the host."""

from collections.abc import Iterable
from typing import Any

import torch
from _records import site
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch


class MixUpError(RuntimeError):
    """An operation got tensors of the host beside tensors of the device."""


def tensors_in(values: Iterable[Any]) -> list[Any]:
    """The tensors in arguments or results, which may be lists of them."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, str | bytes) and isinstance(value, Iterable):
            found += tensors_in(value)
    return found


def here(tensor: Any) -> bool:
    """Whether it is a tensor of the fake device."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def numbers_as_shapes(func: Any, value: Any) -> Any:
    """An argument with single numbers of the host as shapes, which kernels take as they are.

    Raises:
        MixUpError: it is more than a number.
    """
    if isinstance(value, list | tuple):
        return [numbers_as_shapes(func, entry) for entry in value]
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    if value.ndim:
        raise MixUpError(f"{site()}: {func} got a tensor {tuple(value.shape)} of the CPU beside tensors on cuda")
    return torch.empty((), dtype=value.dtype)


def form_of(value: Any) -> Any:
    """What of an argument decides the form of results."""
    if isinstance(value, FakeTensor):
        return value.shape, value.stride(), value.dtype, value.fake_device.type
    return tuple(form_of(entry) for entry in value) if isinstance(value, list | tuple) else (type(value), value)


def of_form(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of nothing but this form."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def valued(value: Any) -> Any:
    """An argument with the known values of its tensors."""
    if isinstance(value, list | tuple):
        return [valued(entry) for entry in value]
    return value._value if isinstance(value, FakeTensor) else value


def empty_as(like: Tensor, dtype: torch.dtype, device: torch.device, form: Any) -> Any:
    """A fake tensor on a device, in the layout of another tensor, or in a memory format if one is given."""
    if isinstance(like, FakeTensor):
        return torch.empty_like(like, dtype=dtype, device=device, memory_format=form or torch.preserve_format)
    if form not in (None, torch.preserve_format):
        return torch.empty(like.shape, dtype=dtype, device=device, memory_format=form)
    with no_dispatch():
        strides = torch.empty_like(like, device="meta").stride()
    return torch.empty_strided(like.shape, strides, dtype=dtype, device=device)
