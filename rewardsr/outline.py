"""Pipelines of which the sizes are enough: whoever converts a LoRA needs to know what it fits, not what it computes.

Inside `outlined` a network's weights are on the meta device, which has shapes and no values, but for a sample: enough
to tell its base from another. Whatever would compute with the others fails.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

SMALL = 2**16  # weights; what is no larger is always read: norms, biases, the first and last convolution
MATRICES = 16  # of the others so many are read, spread over the network and none above the median size

_outlined: ContextVar[Collection[str] | None] = ContextVar("outlined", default=())


@contextmanager
def outlined(parts: Collection[str] | None = None) -> Iterator[None]:
    """Inside, these parts of a pipeline ("unet") are loaded without their weights; None: all parts that can be.

    Only what is loaded as plain diffusers networks, or through `rewardsr.adapters._networks`, can be; the rest comes
    whole.
    """
    token = _outlined.set(parts)
    try:
        yield
    finally:
        _outlined.reset(token)


def is_outlined(part: str) -> bool:
    """Whether a part of this name is to be loaded without its weights."""
    parts = _outlined.get()
    return parts is None or part in parts


def sampled(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of the tensors of a network that are read; a function of names and shapes alone."""
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    large = sorted(size for size in sizes.values() if size > SMALL)
    median = large[len(large) // 2] if large else 0
    matrices = [name for name, size in sizes.items() if SMALL < size <= median]
    spread = {matrices[index * len(matrices) // MATRICES] for index in range(MATRICES)} if matrices else set()
    return spread | {name for name, size in sizes.items() if size <= SMALL}
