"""Measuring the parts of a real step: its own calls are wrapped, nothing of it is written again."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rewardsr import lora

REWARDS, REST = "rewards", "all else"


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was told.

    On one CPU thread they are those that this process has had, whatever else runs on the machine.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step."""
    began = now(device)
    step()
    return now(device) - began


class Meter:
    """Time, memory and floating-point operations by part.

    Time is exclusive: what a part calls that is a part itself is not counted twice. On CUDA the device is waited for
    at every border, so the sum is a little more than an undisturbed step; compare with that.

    Args:
        device: what to wait for, and whose memory to watch.
        count: count operations instead of taking the time (counting is slow).
    """

    def __init__(self, device: torch.device, count: bool = False) -> None:
        self._cuda, self._count, self._device = device.type == "cuda", count, device
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._open: list[str] = [REST]
        self._since = 0.0

    def begin(self) -> None:
        """Start the clock of a step; everything outside of the parts is "all else"."""
        self.seconds, self.calls = {}, {}
        self._open = [REST]
        self._since = now(self._device)

    def end(self) -> dict[str, float]:
        """Stop it; seconds by part."""
        self._charge()
        return dict(self.seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part."""
        self._charge()
        self._open.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        try:
            if self._count:
                with FlopCounterMode(display=False) as counter:
                    yield
                self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()
            else:
                yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self._device) - self._since
        if self._cuda:
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = now(self._device)


class _Timed:
    """A callable that reports to the meter; it has the attributes of what it calls."""

    def __init__(self, function: Any, meter: Meter, part: Callable[[], str]) -> None:
        self._function, self._meter, self._part = function, meter, part

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._meter.part(self._part()):
            return self._function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


@contextmanager
def watched(adapter: Any, method: Any, meter: Meter, around: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Inside, every network pass of the method reports to the meter.

    Args:
        adapter: of the Stable Diffusion family.
        method: GDPO or RFSR on that adapter.
        meter: where to report.
        around: changes each of the wrapped calls once more, from inside (`on_meta`).
    """
    state = {"preparing": False, "encoding": False}
    change = around or (lambda hook: hook)
    back_propagates = method.differentiates

    def flagged(function: Any, flag: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            state[flag] = True
            try:
                return function(*arguments, **options)
            finally:
                state[flag] = False

        return call

    def prediction() -> str:
        if state["preparing"]:
            return "rollout" if back_propagates else "group sampling"
        return "policy forward" if lora.active(adapter) else "reference forward"

    hooks = {
        "_text": lambda: "text",
        "_to_latents": lambda: "LQ encode" if state["encoding"] else "re-encode",
        "_to_image": lambda: "reference decode" if back_propagates and not lora.active(adapter) else "decode",
        "_predict": prediction,
    }
    recorded = adapter.network_call
    for name, part in hooks.items():
        setattr(adapter, name, _Timed(change(getattr(adapter, name)), meter, part))
    if recorded is not None:
        adapter.network_call = _Timed(recorded, meter, prediction)
    adapter._encode = flagged(adapter._encode, "encoding")
    method.prepare = flagged(method.prepare, "preparing")
    rewards, style = dict(method.rewards), getattr(method, "_vgg", None)
    method.rewards.update({name: _Timed(reward, meter, lambda: REWARDS) for name, reward in rewards.items()})
    if style is not None:
        method._vgg = _Timed(change(style), meter, lambda: "style")
    backward, gradients = Tensor.backward, torch.autograd.grad

    def timed_backward(*arguments: Any, **options: Any) -> Any:
        with meter.part("backward"):
            return backward(*arguments, **options)

    Tensor.backward = timed_backward  # type: ignore[method-assign]
    torch.autograd.grad = _Timed(gradients, meter, lambda: "backward")
    try:
        yield
    finally:
        Tensor.backward, torch.autograd.grad = backward, gradients  # type: ignore[method-assign]
        method.rewards.update(rewards)
        if style is not None:
            method._vgg = style
        for name in (*hooks, "_encode"):
            delattr(adapter, name)
        adapter.network_call = recorded
        del method.prepare


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product, the best of several: what a device can do at most."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(10)]
    return 2 * side**3 / min(seconds) / 1e12


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part over several steps."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}
