"""How much memory a step takes at its peak, above what is there before it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewardsr.errors import TrainingError, is_out_of_memory

T = TypeVar("T")


class Storages(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still alive, and their largest sum so far.

    What kernels use within themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._seen: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._seen:
                    self._take(storage)
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.alive -= size

        self._seen[key] = weakref.ref(storage, gone), size
        self.alive += size
        self.peak = max(self.peak, self.alive)


def working(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step takes at its peak, above what is held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # A compiled graph would show nothing of what is inside.
    with torch.compiler.set_stance("force_eager"), Storages() as storages:
        step()
    return storages.peak


def held(*of: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for tensors in of for t in tensors}
    return sum(storages.values())


def unless_out_of_memory(work: Callable[[], T], device: torch.device) -> T | None:
    """What the work returns; None if there is not enough memory for it."""
    try:
        return work()
    except (TrainingError, RuntimeError) as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None
