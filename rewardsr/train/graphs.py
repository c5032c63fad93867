"""Network calls of a run as CUDA graphs: recorded once, then launched whole, where Python launches kernel by kernel.

A UNet of Stable Diffusion 2.1's size is 750 kernels a call, and more with LoRAs and gradients: on a fast card most of a
call is launching them. What a graph computes is what the call computed when it was recorded, kernel for kernel.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Condition
from rewardsr.errors import UserError, is_out_of_memory, one_line

MOST = 16  # graphs of a run; each keeps the memory of its call


class Recorder(Protocol):
    """How work on a device is recorded."""

    def pool(self) -> Any:
        """Memory for recordings that are never needed at the same time."""
        ...

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """What repeats the work of `function` on the device, with tensors where they were; it need not have run."""
        ...


class CUDARecorder:
    """CUDA graphs of a card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pool(self) -> Any:
        """A memory pool of its own."""
        return torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], None], pool: Any) -> Callable[[], None]:
        """The replay of a graph."""
        graph = torch.cuda.CUDAGraph()
        # Threads that load images pin memory meanwhile: only what this thread does may not wait.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Graphs:
    """Stands in for an adapter's network call.

    The first call of a kind (shapes, which LoRAs are on, whether gradients are wanted) runs as written, and libraries
    find their algorithms; the second is recorded, and from then on it is replayed. A call whose gradients are still
    wanted when the next of its kind comes leaves that one to run as written: a graph holds one call's activations.

    Args:
        adapter: whose network call it is; its networks stay where they are.
        weights: all that is trained, float32; they change in place.
        recorder: of the device.
    """

    def __init__(self, adapter: ISRAdapter, weights: Iterable[nn.Parameter], recorder: Recorder) -> None:
        self._adapter, self._weights, self._recorder = adapter, tuple(weights), recorder
        self._known: dict[Hashable, _Graph | bool] = {}
        self._pool = recorder.pool()

    def __call__(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the adapter's `_predict` gives, with its gradients.

        Raises:
            UserError: the call cannot be recorded.
        """
        inputs = [z_t, t, *condition.tensors()]
        kind = (torch.is_grad_enabled(), condition.size, self._weights_used(), *map(_looks, inputs))
        graph = self._known.get(kind)
        if isinstance(graph, bool):
            graph = self._known[kind] = self._recorded(inputs, condition, differentiable=graph)
        if graph is not None and not graph.busy:
            return graph(inputs)
        prediction = self._adapter._predict(z_t, t, condition)
        if graph is None and len(self._known) < MOST:
            self._known[kind] = prediction.requires_grad
        return prediction

    def _weights_used(self) -> Hashable:
        return lora.switches(self._adapter), tuple(weight.data_ptr() for weight in self._weights)

    def _recorded(self, inputs: Sequence[Tensor], condition: Condition, differentiable: bool) -> "_Graph":
        adapter = self._adapter  # and not self: graphs that are replaced go at once, with their memory

        def call(z_t: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
            return adapter._predict(z_t, t, condition.with_tensors(rest))

        # Without gradients a call is over when its result has been copied, so that all such calls can share memory.
        pool = self._recorder.pool() if differentiable else self._pool
        try:
            return _Graph(call, inputs, self._weights, self._adapter.networks.values(), self._recorder, pool)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"cuda_graphs: the network call of adapter '{self._adapter.name}' cannot be recorded: "
                f"{one_line(error)}; set cuda_graphs=false"
            ) from error


class _Graph:
    """A call of one kind, recorded: forward, and backward where a weight or an input wants a gradient."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        weights: Sequence[nn.Parameter],
        networks: Iterable[nn.Module],
        recorder: Recorder,
        pool: Any,
    ) -> None:
        self._call, self._weights, self._grad = call, weights, torch.is_grad_enabled()
        # Autograd ties a leaf to the stream of its first use, as long as any graph has it: a recording needs its own.
        self._twins = [nn.Parameter(weight.detach(), weight.requires_grad) for weight in weights]
        self._places = _places(networks, dict(zip(weights, self._twins, strict=True)))
        self._inputs = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
        self._pending: weakref.ref[_Call] | None = None
        self._replay = recorder.record(self._forward, pool)
        self._differentiable = self._output.requires_grad
        if self._differentiable:
            self._gradient = torch.zeros_like(self._output)
            self._replay_backward = recorder.record(self._backward, pool)

    @property
    def busy(self) -> bool:
        """Whether the gradients of the last call may still be asked for."""
        return self._pending is not None and self._pending() is not None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        if not self._differentiable:
            return self.forward(inputs)
        output: Tensor = _Replay.apply(self, len(inputs), *inputs, *self._weights)
        return output

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The result of the call."""
        with torch.no_grad():
            for own, value in zip(self._inputs, inputs, strict=True):
                own.copy_(value)
        self._replay()
        return self._output.detach().clone()

    def pend(self) -> "_Call":
        """Be busy from now on, until `gradients` are asked for, or what is returned is gone: nobody will ask then."""
        call = _Call()
        self._pending = weakref.ref(call)
        return call

    def gradients(self, call: "_Call", gradient: Tensor) -> list[Tensor | None]:
        """Gradients of inputs and weights, None for those that the call does not reach."""
        if self._pending is None or self._pending() is not call:
            raise RuntimeError("gradients of a recorded network call can be had once: its activations are gone")
        self._pending = None
        self._gradient.copy_(gradient)
        self._replay_backward()
        # A copy: a weight keeps what it is given as its gradient, and the next replay writes here again.
        values = iter(self._flat.clone().split([own.numel() for own in self._reached if own is not None]))
        return [None if own is None else next(values).view_as(own) for own in self._reached]

    def _forward(self) -> None:
        with torch.set_grad_enabled(self._grad), _standing_in(self._places):
            self._output = self._call(*self._inputs)

    def _backward(self) -> None:
        everything = (*self._inputs, *self._twins)
        learning = [value for value in everything if value.requires_grad]
        found = iter(torch.autograd.grad(self._output, learning, self._gradient, allow_unused=True))
        gradients = [next(found) if value.requires_grad else None for value in everything]
        self._flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        self._reached = [
            None if gradient is None else value for value, gradient in zip(everything, gradients, strict=True)
        ]


class _Call:
    """Somebody may want gradients of it, as long as it exists."""


class _Replay(torch.autograd.Function):
    """A recorded call as an operation of autograd."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, count: int, *tensors: Tensor) -> Tensor:
        ctx.graph, ctx.call = graph, graph.pend()
        return graph.forward(tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.gradients(ctx.call, gradient)


_Place = tuple[dict[str, nn.Parameter | None], str, nn.Parameter]


def _places(networks: Iterable[nn.Module], twins: Mapping[nn.Parameter, nn.Parameter]) -> list[_Place]:
    """Where weights hang in the networks, by name, each with its twin."""
    modules = (module for network in networks for module in network.modules())
    return [
        (module._parameters, name, twins[weight])
        for module in modules
        for name, weight in module._parameters.items()
        if weight is not None and weight in twins
    ]


@contextmanager
def _standing_in(places: Sequence[_Place]) -> Iterator[None]:
    """Inside, the twins are the networks' weights."""
    before = [parameters[name] for parameters, name, _ in places]
    try:
        for parameters, name, twin in places:
            parameters[name] = twin
        yield
    finally:
        for (parameters, name, _), weight in zip(places, before, strict=True):
            parameters[name] = weight


def _looks(value: Tensor) -> Hashable:
    return tuple(value.shape), value.dtype, value.requires_grad


def use_graphs(adapter: ISRAdapter, weights: Iterable[nn.Parameter]) -> None:
    """Let the adapter's network calls be recorded and replayed; graphs of before are forgotten."""
    adapter.network_call = Graphs(adapter, weights, CUDARecorder(adapter.device))


def recorded_bytes(adapter: ISRAdapter) -> int:
    """What an adapter's CUDA graphs keep for themselves; the allocator does not count it as given out."""
    if adapter.network_call is None:
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


@contextmanager
def as_written(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, network calls are neither recorded nor replayed: held-out images have many shapes."""
    before, adapter.network_call = adapter.network_call, None
    try:
        yield
    finally:
        adapter.network_call = before
