"""What is written down of a step on the fake device: its costs, its copies and waits, and who asked for them."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _torch_patches import convolved_format
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = tuple(str(ROOT / folder) + "/" for folder in ("rewardsr", "adapters"))
HELPERS = tuple(f"rewardsr/{name}.py" for name in ("checks", "draws", "transfer"))  # they copy and read for others

# What an H100 reaches in practice, for the estimate: operations and bytes a second, and seconds between two kernels.
HALF_RATE, FLOAT32_RATE, TF32_RATE, BANDWIDTH, LAUNCH = 600e12, 45e12, 300e12, 2.7e12, 2e-6


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


def site() -> str:
    """File and line of the package that is asking, as `Event.site` has it."""
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


def layout_copies(func: Any, args: Any) -> list[int]:
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


def seconds(func: Any, tensors: Iterable[Tensor], flops: int, moved: int) -> float:
    """The least that a kernel takes for so many operations and bytes, in the precision of its first tensor."""
    return max(flops / _rate(func, tensors), moved / BANDWIDTH, LAUNCH)


def _rate(func: Any, tensors: Iterable[Tensor]) -> float:
    """Operations a second in the precision of the first tensor."""
    dtype = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        return HALF_RATE
    library = torch.backends.cudnn if "convolution" in func._opname else torch.backends.cuda.matmul
    return TF32_RATE if library.allow_tf32 else FLOAT32_RATE
