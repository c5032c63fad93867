"""A CUDA device without a card: its tensors have shapes and no values, those of the CPU are real.

Under `fake_cuda()` the device 'cuda' is torch's FakeTensorMode, and a dispatch mode above it sees every operation: it
counts kernels, operations and bytes, follows what is allocated, and notes each copy between host and device and each
value that is read, with the line of the package that asked for it. An operation on tensors of both sides fails.
"""

import math
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _torch_patches import convolved_format, patched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = tuple(str(ROOT / folder) + "/" for folder in ("rewardsr", "adapters"))
HELPERS = tuple(f"rewardsr/{name}.py" for name in ("checks", "draws", "transfer"))  # they copy and read for others
REST = "all else"
GRAIN = 512  # bytes: CUDA's allocator rounds up to it
SMALL = 4096  # elements: smaller tensors keep their values where they are known
CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")

# What an H100 reaches in practice, for the estimate: operations and bytes a second, and seconds between two kernels.
HALF_RATE, FLOAT32_RATE, TF32_RATE, BANDWIDTH, LAUNCH = 600e12, 45e12, 300e12, 2.7e12, 2e-6

aten = torch.ops.aten
_FORMS: dict[Any, list[Any]] = {}  # of results, by operation and forms of arguments
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
CERTAIN = {"arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"}  # made of arguments alone
FALSE = {"any", "bitwise_not", "isinf", "isnan", "logical_not"}  # where all is well; other unknown truths are true


class MixUpError(RuntimeError):
    """An operation got tensors of the host beside tensors of the device."""


@dataclass(frozen=True)
class Event:
    """A copy between host and device, or a wait of the host for the device.

    Attributes:
        kind: "H2D" and "D2H" (copies), "read" (one value), "shape" (a shape that depends on values) or "wait".
        operation: what asked for it.
        site: file and line of the package, the innermost but for `HELPERS`; "elsewhere" where there is none.
        part: of the step.
        bytes: that travel.
        pinned: whether the host's side is page-locked.
        waits: whether the host waits for the device.
    """

    kind: str
    operation: str
    site: str
    part: str
    bytes: int = 0
    pinned: bool = False
    waits: bool = True

    @property
    def copies(self) -> bool:
        """Whether it is a copy of a tensor."""
        return self.kind in ("H2D", "D2H")


@dataclass
class Cost:
    """Of a part, or of all: what was launched, and the most bytes that were allocated meanwhile."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.kernels + other.kernels,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            max(self.peak, other.peak),
        )


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
            self.events.append(Event(kind, operation, _site(), self._parts[-1], **about))

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
        tensors = _tensors((args, kwargs.values()))
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
        shapes = [_scalars(func, value) for value in args], {key: _scalars(func, kwargs[key]) for key in kwargs}
        result = self._shaped(func, *shapes)
        outputs = [tensor for tensor in _tensors((result,)) if _here(tensor)]
        fresh = [self._register(tensor) for tensor in outputs]
        values = self._values(func, args, kwargs, outputs)
        mutable = func._schema.is_mutable
        if values is not None:
            for tensor, value in zip(outputs, values, strict=True):
                tensor._value = value
        elif mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors((value,)):
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
        key = func, _form(args), _form(tuple(kwargs.items()))
        forms = _FORMS.get(key)
        if forms is None:
            result = func(*args, **kwargs)
            if "group_norm" in func._opname and result[0] is not None:  # CUDA's works on contiguous images alone
                result = result[0].contiguous(), *result[1:]
            if not func._schema.is_mutable:
                self._remember(key, result if isinstance(result, tuple) else (result,))
            return result
        with no_dispatch():
            made = [None if form is None else _bare(*form) for form in forms]
        results = tuple(None if bare is None else FakeTensor(self.shapes, bare, CUDA) for bare in made)
        return results if len(func._schema.returns) > 1 else results[0]

    def _remember(self, key: Any, results: tuple[Any, ...]) -> None:
        """Keep the forms of results that are all new, compact tensors of the device."""
        forms: list[Any] = []
        for result in results:
            if _here(result):
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
        given = _tensors((args, kwargs.values()))
        if not outputs or any(tensor.numel() > SMALL for tensor in outputs):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags or (not given and func._opname not in CERTAIN):
            return None
        if any(isinstance(tensor, FakeTensor) and self.value(tensor) is None for tensor in given):
            return None
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CPU}
        with no_dispatch():
            result = func(*(_valued(value) for value in args), **{key: _valued(kwargs[key]) for key in kwargs})
        return _tensors((result,))

    def value(self, tensor: Any) -> Tensor | None:
        """What a tensor of the device holds, if that is known."""
        return getattr(tensor, "_value", None) if _here(tensor) and self._block(tensor).known else None

    def _charge(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        touched = {id(tensor): tensor for tensor in _tensors((args, kwargs.values(), result)) if _here(tensor)}
        moved = sum(min(tensor.numel() * tensor.itemsize, self._block(tensor).size) for tensor in touched.values())
        cost = self._see_peak()
        copies = _layout_copies(func, args)
        cost.peak = max(cost.peak, self.allocated + sum(copies))
        cost.kernels += 1 + len(copies)
        cost.flops += flops
        cost.bytes += moved + 2 * sum(copies)
        cost.seconds += max(flops / _rate(func, touched.values()), moved / BANDWIDTH, LAUNCH)
        cost.seconds += sum(max(2 * size / BANDWIDTH, LAUNCH) for size in copies)

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
        result = _empty(source, dtype, CUDA, form)
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
            return _empty(source, dtype, CPU, options.get("memory_format"))
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
        if _here(target) and not _here(source):
            self._sent(func, source, target, non_blocking)
            self._block(target).known = False
            return target
        if _here(source) and not _here(target):
            with no_dispatch():
                return target.copy_(self._download(func, source, non_blocking=non_blocking))
        return NotImplemented

    def _read(self, func: Any, source: Tensor) -> Any:
        self.note("read", func._opname, bytes=source.itemsize)
        value = self._plausible(source)
        with no_dispatch():
            return value.item()

    def _equal(self, func: Any, one: Tensor, other: Tensor) -> bool:
        _scalars(func, [one, other])
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


def _tensors(values: Iterable[Any]) -> list[Any]:
    """The tensors in arguments or results, which may be lists of them."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, str | bytes) and isinstance(value, Iterable):
            found += _tensors(value)
    return found


def _here(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _scalars(func: Any, value: Any) -> Any:
    """An argument with single numbers of the host as shapes, which kernels take as they are.

    Raises:
        MixUpError: it is more than a number.
    """
    if isinstance(value, list | tuple):
        return [_scalars(func, entry) for entry in value]
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    if value.ndim:
        raise MixUpError(f"{_site()}: {func} got a tensor {tuple(value.shape)} of the CPU beside tensors on cuda")
    return torch.empty((), dtype=value.dtype)


def _form(value: Any) -> Any:
    """What of an argument decides the form of results."""
    if isinstance(value, FakeTensor):
        return value.shape, value.stride(), value.dtype, value.fake_device.type
    return tuple(_form(entry) for entry in value) if isinstance(value, list | tuple) else (type(value), value)


def _bare(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=META)


def _valued(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_valued(entry) for entry in value]
    return value._value if isinstance(value, FakeTensor) else value


def _empty(like: Tensor, dtype: torch.dtype, device: torch.device, form: Any) -> Any:
    if isinstance(like, FakeTensor):
        return torch.empty_like(like, dtype=dtype, device=device, memory_format=form or torch.preserve_format)
    if form not in (None, torch.preserve_format):
        return torch.empty(like.shape, dtype=dtype, device=device, memory_format=form)
    with no_dispatch():
        strides = torch.empty_like(like, device="meta").stride()
    return torch.empty_strided(like.shape, strides, dtype=dtype, device=device)


def _layout_copies(func: Any, args: Any) -> list[int]:
    """Bytes of each copy that a kernel makes inside, for as long as it takes, of what has not its layout."""
    count = 2 if "backward" in func._opname else 1  # the gradient goes before the image
    if "convolution" in func._opname:
        taken, form = args[: count + 1], convolved_format(*args[count - 1 : count + 1])
    elif "group_norm" in func._opname:
        taken, form = args[:count], torch.contiguous_format
    else:
        return []
    copied = [tensor for tensor in taken if not tensor.is_contiguous(memory_format=form)]
    return [tensor.numel() * tensor.itemsize for tensor in copied]


def _rate(func: Any, tensors: Iterable[Tensor]) -> float:
    """Operations a second in the precision of the first tensor."""
    dtype = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        return HALF_RATE
    library = torch.backends.cudnn if "convolution" in func._opname else torch.backends.cuda.matmul
    return TF32_RATE if library.allow_tf32 else FLOAT32_RATE


def _site() -> str:
    frame: Any = sys._getframe(1)
    found = "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            found = f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
            if not found.startswith(HELPERS):
                break
        frame = frame.f_back
    return found
