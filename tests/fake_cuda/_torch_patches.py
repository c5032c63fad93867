"""What of torch asks a real CUDA, or decides by C++'s idea of a tensor's device, while the device is `_fake`'s."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import clip_grad

# What torch.autocast runs in the lower precision, and in float32, on CUDA; of its lists, what networks here use.
LOWER = (
    *((F, name) for name in ("linear", "conv2d", "scaled_dot_product_attention")),
    *((torch, name) for name in ("addmm", "baddbmm", "bmm", "matmul", "mm")),
    *((Tensor, name) for name in ("__matmul__", "bmm", "matmul")),
)
UPPER = (
    *((F, name) for name in ("group_norm", "layer_norm", "softmax")),
    (torch, "softmax"),
    *((Tensor, name) for name in ("softmax", "norm", "pow", "__pow__", "sum")),
)


@contextmanager
def patched(mode: Any) -> Iterator[None]:
    """Inside, torch does on a machine without CUDA what it would do with it.

    - `torch.cuda.synchronize` would initialise CUDA: it is noted.
    - `torch.autocast('cuda')` would switch itself off, and asks the card for bf16.
    - autocast's casts belong to C++, which sees no CUDA tensors here: `_cast` stands in for them.
    - modules would swap fake parameters for their copies, which weak references forbid: they take the copies' data.
    - clipping takes one kernel for all gradients only where they are of torch's own type.
    - which layout a convolution has is decided by the library that does it: without a card that is not cuDNN.
    - attention in C++ would fall back to the form with an N x N matrix: `_attention` stands in for it.
    - `tolist` of a fake tensor would read element by element: it is one copy.
    """
    cast: dict[int, tuple[Tensor, Tensor]] = {}
    clear = torch.clear_autocast_cache

    def clear_all() -> None:
        cast.clear()
        clear()

    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "synchronize", lambda device=None: mode.note("wait", "synchronize")),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch, "clear_autocast_cache", clear_all),
        (torch.utils, "swap_tensors", _take_data),
        (torch._C, "_conv_determine_backend_memory_format", lambda x, weight, _: convolved_format(x, weight)),
        (clip_grad, "_has_foreach_support", lambda tensors, device: True),
        (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
    ]
    replacements.append((F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention)))
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for owner, name in (*LOWER, *UPPER):
            casting = _cast(getattr(owner, name), (owner, name) in LOWER, cast)
            stack.enter_context(mock.patch.object(owner, name, casting))
        yield


def convolved_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout that cuDNN works in: channels last where the image or the weights are so."""
    last = x.ndim == 4 and torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if last else torch.contiguous_format


def _take_data(parameter: Any, other: Any) -> None:
    parameter.data = other.data
    parameter.fake_device = other.fake_device


def _attention(function: Any) -> Callable[..., Any]:
    """Attention by a kernel that keeps the logarithms of sums, and no N x N matrix, as every fused one does."""

    @wraps(function)
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if not isinstance(query, FakeTensor):
            return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        assert not enable_gqa, "networks here have as many keys as queries"
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]

    return call


def _cast(function: Any, lower: bool, cast: dict[int, tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The function with autocast's casts; those of weights are kept until the outermost autocast ends."""

    def converted(value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, FakeTensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (lower and value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in cast:
            cast[id(value)] = value, value.to(dtype)
        return cast[id(value)][1]

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if lower else torch.float32
            arguments = tuple(converted(value, dtype) for value in arguments)
            options = {name: converted(value, dtype) for name, value in options.items()}
        return function(*arguments, **options)

    return call
