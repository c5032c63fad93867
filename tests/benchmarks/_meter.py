"""Measuring the parts of a real GDPO step: its own calls are wrapped, nothing of it is written again."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rewardsr.trainers.gdpo import GDPO

PARTS = (
    *("text", "LQ encode", "group sampling", "decode", "re-encode"),
    *("policy forward", "backward", "reference forward"),
)
REWARDS, REST = "rewards", "all else"


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
        self._since = self._now()

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
        now, name = self._now(), self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        if self._cuda:
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = self._now()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def watched(adapter: Any, method: GDPO, meter: Meter, around: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Inside, every network pass of the method reports to the meter.

    Args:
        adapter: of the Stable Diffusion family.
        method: GDPO on that adapter.
        meter: where to report.
        around: changes each of the wrapped hooks once more, from inside (`on_meta`).
    """
    state = {"preparing": False, "encoding": False}
    change = around or (lambda hook: hook)

    def flagged(function: Any, flag: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            state[flag] = True
            try:
                return function(*arguments, **options)
            finally:
                state[flag] = False

        return call

    def timed(function: Any, name: Callable[[], str]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with meter.part(name()):
                return function(*arguments, **options)

        return call

    def prediction() -> str:
        if state["preparing"]:
            return "group sampling"
        return "policy forward" if torch.is_grad_enabled() else "reference forward"

    hooks = {
        "_text": lambda: "text",
        "_to_latents": lambda: "LQ encode" if state["encoding"] else "re-encode",
        "_to_image": lambda: "decode",
        "_predict": prediction,
    }
    for name, part in hooks.items():
        setattr(adapter, name, timed(change(getattr(adapter, name)), part))
    adapter._encode = flagged(adapter._encode, "encoding")
    method.prepare = flagged(method.prepare, "preparing")  # type: ignore[method-assign]
    rewards = dict(method.groups.rewards)
    method.groups.rewards = {name: timed(reward, lambda: REWARDS) for name, reward in rewards.items()}
    for name, reward in rewards.items():  # what GDPO looks at besides calling them
        method.groups.rewards[name].kind = reward.kind
    backward, gradients = Tensor.backward, torch.autograd.grad
    Tensor.backward = timed(backward, lambda: "backward")  # type: ignore[method-assign]
    torch.autograd.grad = timed(gradients, lambda: "backward")
    try:
        yield
    finally:
        Tensor.backward, torch.autograd.grad = backward, gradients  # type: ignore[method-assign]
        method.groups.rewards = rewards
        for name in (*hooks, "_encode"):
            delattr(adapter, name)
        del method.prepare  # type: ignore[method-assign]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product, the best of several: what a device can do at most."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            a @ b
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1000)
        else:
            began = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e12


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part over several steps."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}
