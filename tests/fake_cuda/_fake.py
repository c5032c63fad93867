"""A CUDA device without a card: its tensors have shapes and no values, those of the CPU are real.

Under `fake_cuda()` the device 'cuda' is torch's FakeTensorMode, and a dispatch mode above it sees every operation: it
counts kernels, operations and bytes, follows what is allocated, and notes each copy between host and device and each
value that is read, with the line of the package that asked for it. An operation on tensors of both sides fails.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _records import Cost, Event, layout_copies, seconds, site
from _tensors import empty_as, form_of, here, numbers_as_shapes, of_form, tensors_in, valued
from _torch_patches import patched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

REST = "all else"
GRAIN = 512  # bytes: CUDA's allocator rounds up to it
SMALL = 4096  # elements: smaller tensors keep their values where they are known
CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")

aten = torch.ops.aten
_FORMS: dict[Any, list[Any]] = {}  # of results, by operation and forms of arguments
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
CERTAIN = {"arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"}  # made of arguments alone
FALSE = {"any", "bitwise_not", "isinf", "isnan", "logical_not"}  # where all is well; other unknown truths are true


@dataclass
class _Block:
    """An allocation on the device: its size, whether it is a weight's, and what is known of its values."""

    size: int
    weight: bool
    known: bool = False  # then each tensor on it has a `_value`
    false: bool = False  # truth values that are false if all is well
    gone: Any = None  # the weak reference that tells of its end


class FakeCuda(TorchDispatchMode):
    """The dispatch mode; make it with `fake_cuda()`.

    Attributes:
        allocated: bytes on the device.
        events: copies and waits since `reset`, in order.
        costs: by part, since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes = FakeTensorMode()
        self.allocated = 0
        self._building = False
        self._blocks: dict[int, _Block] = {}
        self._pinned: dict[int, Any] = {}
        self._parts = [REST]
        self._random = torch.Generator().manual_seed(0)
        self.reset()

    # ---- what is measured ----

    def reset(self) -> None:
        """Forget what was counted; what is allocated stays."""
        self.events: list[Event] = []
        self.costs: dict[str, Cost] = {REST: Cost(peak=self.allocated)}

    @property
    def total(self) -> Cost:
        """Of all parts."""
        return sum(self.costs.values(), Cost())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        self._parts.append(name)
        self._see_peak()
        try:
            yield
        finally:
            self._parts.pop()

    @contextmanager
    def weights(self) -> Iterator[None]:
        """What is allocated inside are weights: copied to the host they have no values there either, and no memory."""
        before, self._building = self._building, True
        try:
            yield
        finally:
            self._building = before

    def note(self, kind: str, operation: str, **about: Any) -> None:
        """Note a copy or a wait that the calling code asked for."""
        if not self._building:
            self.events.append(Event(kind, operation, site(), self._parts[-1], **about))

    def _see_peak(self) -> Cost:
        cost = self.costs.setdefault(self._parts[-1], Cost())
        cost.peak = max(cost.peak, self.allocated)
        return cost

    # ---- every operation ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # Only C++ asks so. Told 'cuda', autograd's engine would look for the device's streams and threads.
            return CPU if args[0].fake_device.type == "cpu" else META
        if kwargs.get("device") == META:  # C++ made it like a tensor of ours
            kwargs = {**kwargs, "device": CUDA}
        device = kwargs.get("device")
        to_device = device is not None and device.type == "cuda"
        tensors = tensors_in((args, kwargs.values()))
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is aten._to_copy.default and to_device:
                return self._upload(func, *args, **kwargs)
            if not to_device:
                return self._on_host(func, args, kwargs)
        special = _SPECIAL.get(func)
        result = NotImplemented if special is None else special(self, func, *args, **kwargs)
        return self._on_device(func, args, kwargs) if result is NotImplemented else result

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self._pinned
        pin = kwargs.get("pin_memory") or func is aten._pin_memory.default
        with no_dispatch():
            if func is aten._pin_memory.default:
                result = args[0].clone()
            else:
                result = func(*args, **({**kwargs, "pin_memory": False} if pin else kwargs))
        if pin:
            self._pin(result)
        return result

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation by its shapes, and by its values where these are known."""
        named = {key: numbers_as_shapes(func, value) for key, value in kwargs.items()}
        result = self._shaped(func, [numbers_as_shapes(func, value) for value in args], named)
        outputs = [tensor for tensor in tensors_in((result,)) if here(tensor)]
        fresh = [self._register(tensor) for tensor in outputs]
        values = self._values(func, args, kwargs, outputs)
        mutable = func._schema.is_mutable
        if values is not None:
            for tensor, value in zip(outputs, values, strict=True):
                tensor._value = value
        elif mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in((value,)):
                        self._block(tensor).known = False
        for tensor in (tensor for tensor, new in zip(outputs, fresh, strict=True) if new):
            self._block(tensor).known = values is not None
            self._block(tensor).false = func._opname in FALSE
        if (any(fresh) or mutable) and func._opname not in NO_KERNEL:
            self._charge(func, args, kwargs, result)
        return result

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What FakeTensorMode gives; what it gave before for such arguments is made again, in less time."""
        if func.is_view:
            with in_kernel_invocation_manager(self.shapes):
                bare = func(*args, **kwargs)
            if isinstance(bare, Tensor):
                return FakeTensor(self.shapes, bare, args[0].fake_device)
            return [FakeTensor(self.shapes, one, args[0].fake_device) for one in bare]
        key = func, form_of(args), form_of(tuple(kwargs.items()))
        forms = _FORMS.get(key)
        if forms is None:
            result = func(*args, **kwargs)
            if "group_norm" in func._opname and result[0] is not None:  # CUDA's works on contiguous images alone
                result = result[0].contiguous(), *result[1:]
            if not func._schema.is_mutable:
                self._remember(key, result if isinstance(result, tuple) else (result,))
            return result
        with no_dispatch():
            made = [None if form is None else of_form(*form) for form in forms]
        results = tuple(None if bare is None else FakeTensor(self.shapes, bare, CUDA) for bare in made)
        return results if len(func._schema.returns) > 1 else results[0]

    def _remember(self, key: Any, results: tuple[Any, ...]) -> None:
        """Keep the forms of results that are all new, compact tensors of the device."""
        forms: list[Any] = []
        for result in results:
            if here(result):
                storage = result.untyped_storage()
                if storage._cdata in self._blocks or storage.nbytes() != result.numel() * result.itemsize:
                    return
                forms.append((result.shape, result.stride(), result.dtype))
            elif result is not None:
                return
            else:
                forms.append(None)
        _FORMS[key] = forms

    def _values(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Tensor] | None:
        """What comes out, where all that goes in is known: masks, indices and times decide what a step does."""
        given = tensors_in((args, kwargs.values()))
        if not outputs or any(tensor.numel() > SMALL for tensor in outputs):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags or (not given and func._opname not in CERTAIN):
            return None
        if any(isinstance(tensor, FakeTensor) and self.value(tensor) is None for tensor in given):
            return None
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        with no_dispatch():
            result = func(*(valued(value) for value in args), **{key: valued(kwargs[key]) for key in kwargs})
        return tensors_in((result,))

    def value(self, tensor: Any) -> Tensor | None:
        """What a tensor of the device holds, if that is known."""
        return getattr(tensor, "_value", None) if here(tensor) and self._block(tensor).known else None

    def _charge(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        touched = {id(tensor): tensor for tensor in tensors_in((args, kwargs.values(), result)) if here(tensor)}
        moved = sum(min(tensor.numel() * tensor.itemsize, self._block(tensor).size) for tensor in touched.values())
        cost = self._see_peak()
        copies = layout_copies(func, args)
        cost.peak = max(cost.peak, self.allocated + sum(copies))
        cost.kernels += 1 + len(copies)
        cost.flops += flops
        cost.bytes += moved + 2 * sum(copies)
        cost.seconds += seconds(func, touched.values(), flops, moved)
        cost.seconds += sum(seconds(func, (), 0, 2 * size) for size in copies)

    # ---- memory ----

    def _register(self, tensor: Tensor) -> bool:
        """Take in the tensor's storage; whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return False
        block = _Block(math.ceil(storage.nbytes() / GRAIN) * GRAIN, self._building)
        block.gone = weakref.ref(storage, lambda _: self._release(key))
        self._blocks[key] = block
        self.allocated += block.size
        self._see_peak()
        return True

    def _release(self, key: int) -> None:
        self.allocated -= self._blocks.pop(key).size

    def _block(self, tensor: Tensor) -> _Block:
        return self._blocks[tensor.untyped_storage()._cdata]

    def _pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key))

    # ---- between host and device ----

    def _upload(self, func: Any, source: Tensor, **options: Any) -> Tensor:
        """A copy of a host's tensor on the device."""
        dtype = options.get("dtype") or source.dtype
        form = options.get("memory_format")
        result = empty_as(source, dtype, CUDA, form)
        self._register(result)
        block = self._block(result)
        block.weight = block.weight or isinstance(source, FakeTensor)
        if not isinstance(source, FakeTensor) and source.numel() <= SMALL:
            with no_dispatch():
                result._value = source.to(dtype, copy=True)
            block.known = True
        self._sent(func, source, result, options.get("non_blocking", False))
        return result

    def _sent(self, func: Any, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        pinned = source.untyped_storage()._cdata in self._pinned
        size = target.numel() * target.itemsize
        self.note("H2D", func._opname, bytes=size, pinned=pinned, waits=not non_blocking)

    def _download(self, func: Any, source: Tensor, **options: Any) -> Tensor:
        """A copy of a device's tensor on the host: what is known, or something plausible; of weights only the shape."""
        dtype = options.get("dtype") or source.dtype
        waits = not options.get("non_blocking", False)
        self.note("D2H", func._opname, bytes=source.numel() * dtype.itemsize, pinned=not waits, waits=waits)
        if self._block(source).weight:
            return empty_as(source, dtype, CPU, options.get("memory_format"))
        result = self._plausible(source)
        with no_dispatch():
            result = result.to(dtype)
        if not waits:
            self._pin(result)
        return result

    def _plausible(self, tensor: Tensor) -> Tensor:
        """Values on the host: what is known; else in [0, 1), 0 for whole numbers, and the truth if all is well."""
        value = self.value(tensor)
        with no_dispatch():
            if value is not None:
                return value.clone()
            if tensor.dtype == torch.bool:
                return torch.full(tensor.shape, not self._block(tensor).false)
            if tensor.dtype.is_floating_point:
                return torch.rand(tensor.shape, generator=self._random).to(tensor.dtype)
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _to(self, func: Any, source: Any, **options: Any) -> Any:
        """`to`, for any pair of places."""
        device = options.get("device")
        target = source.fake_device if device is None else device
        if source.fake_device.type != target.type:
            return (self._download if target.type == "cpu" else self._upload)(func, source, **options)
        dtype, form = options.get("dtype"), options.get("memory_format")
        fits = form in (None, torch.preserve_format) or source.is_contiguous(memory_format=form)
        if target.type == "cuda" and fits and dtype in (None, source.dtype):
            return self._on_device(aten.detach.default, (source,), {})  # in C++ it looked as if it were elsewhere
        return NotImplemented

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
        """`copy_`, for any pair of places."""
        if here(target) and not here(source):
            self._sent(func, source, target, non_blocking)
            self._block(target).known = False
            return target
        if here(source) and not here(target):
            with no_dispatch():
                return target.copy_(self._download(func, source, non_blocking=non_blocking))
        return NotImplemented

    def _read(self, func: Any, source: Tensor) -> Any:
        self.note("read", func._opname, bytes=source.itemsize)
        value = self._plausible(source)
        with no_dispatch():
            return value.item()

    def _equal(self, func: Any, one: Tensor, other: Tensor) -> bool:
        numbers_as_shapes(func, [one, other])
        self.note("read", func._opname, bytes=1)
        return True

    def _nonzero(self, func: Any, source: Tensor) -> Tensor:
        """As if all were true, where values are not known."""
        self.note("shape", func._opname, bytes=8)
        value = self._plausible(source)
        with no_dispatch():
            places = (value if self.value(source) is not None else torch.ones(source.shape)).nonzero()
        result = torch.empty(places.shape, dtype=torch.int64, device=CUDA)
        self._register(result)
        if places.numel() <= SMALL:
            self._block(result).known, result._value = True, places  # type: ignore[attr-defined]
        self._charge(func, (source,), {}, result)
        return result

    def _index(self, func: Any, source: Tensor, indices: Any, *more: Any, **options: Any) -> Any:
        """Indices of the host travel first, and truth values become places."""
        places: list[Any] = []
        for index in indices:
            if index is not None and not isinstance(index, FakeTensor):
                index = self._upload(func, index)
            if index is not None and index.dtype == torch.bool:
                places += self._on_device(aten.unbind.int, (self._nonzero(func, index), 1), {})
                continue
            places.append(index)
        return self._on_device(func, (source, places, *more), options)


_SPECIAL: dict[Any, Any] = {
    aten._to_copy.default: FakeCuda._to,
    aten.copy_.default: FakeCuda._copy,
    aten._local_scalar_dense.default: FakeCuda._read,
    aten.equal.default: FakeCuda._equal,
    aten.nonzero.default: FakeCuda._nonzero,
    aten.index.Tensor: FakeCuda._index,
    aten.index_put.default: FakeCuda._index,
    aten.index_put_.default: FakeCuda._index,
}


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, 'cuda' is a device that computes shapes."""
    mode = FakeCuda()
    with patched(mode), mode.shapes, mode:
        yield mode
