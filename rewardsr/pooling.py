"""What a network takes from a whole image, for a network that sees the image tile by tile.

Group norms and attention look at all of an image. Tile by tile each would look at its own: tiles of a sky and of a wood
come out in different colours, and no blending hides that. So patches from all over the image go through the network
together first. Each norm takes its mean and variance from all of them, and the keys and values of attention are kept.
Then every tile is normalised by these and attends to these, whatever it shows itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Statistics = tuple[Tensor, Tensor]  # of each channel: mean and variance; or of each token: keys and values


class Pooled:
    """Norms and attention of some networks, measured once and then held.

    Args:
        networks: looked through for group norms, diffusers' attention, and its linear attention (AutoencoderDC).
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules: list[Any] = [module for network in networks for module in network.modules()]
        self._norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self._linear = [module for module in modules if hasattr(module, "apply_linear_attention")]
        self._attention = [
            getattr(module, name)
            for module in modules
            if hasattr(module, "to_k") and hasattr(module, "to_v") and module not in self._linear
            for name in ("to_k", "to_v")
        ]
        self._kept: dict[nn.Module, Statistics] = {}
        self._cut: _Cut | None = None

    @contextmanager
    def measuring(self, size: tuple[int, int], margin: tuple[int, int]) -> Iterator[None]:
        """Calls inside take statistics from their whole batch, patches of one size; later calls replace earlier ones.

        Args:
            size: height and width of the patches, in any unit.
            margin: how much of each side does not count, in the same unit: it sees the patch's border.
        """
        self._cut = _Cut(size, margin)
        try:
            with self._patched():
                yield
        finally:
            self._cut = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Calls inside use what was measured."""
        with self._patched():
            yield

    @contextmanager
    def _patched(self) -> Iterator[None]:
        hooks = [module.register_forward_hook(self._tokens) for module in self._attention]
        for norm in self._norms:
            norm.forward = partial(self._normalised, norm)  # type: ignore[method-assign]
        for module in self._linear:
            for name in ("apply_linear_attention", "apply_quadratic_attention"):
                setattr(module, name, partial(self._attended, module, getattr(module, name)))
        try:
            with torch.compiler.set_stance("force_eager"):  # what was compiled knows the modules as they were
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for norm in self._norms:
                del norm.forward
            for module in self._linear:
                del module.apply_linear_attention, module.apply_quadratic_attention

    def _normalised(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if self._cut is not None:
            core = self._cut(x, 2).float().unflatten(1, (norm.num_groups, -1))
            variance, mean = torch.var_mean(core, dim=(0, *range(2, core.ndim)), correction=0)
            each = norm.num_channels // norm.num_groups
            self._kept[norm] = mean.repeat_interleave(each), variance.repeat_interleave(each)
        mean, variance = self._kept[norm]
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        # In one call and without a copy in float32, unlike the formula written out.
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)

    def _tokens(self, projection: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """Keys, or values, (B, tokens, C): instead of a tile's own those of all patches."""
        if self._cut is not None:
            tokens = self._cut(output, 1).flatten(0, -2)[None]
            self._kept[projection] = tokens, tokens
        return self._kept[projection][0].expand(len(output), -1, -1)

    def _attended(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """The same where queries, keys and values are (B, heads, C, tokens)."""
        if self._cut is not None:
            cores = (self._cut(part, 3).flatten(3) for part in (key, value))
            keys, values = (core.movedim(0, 2).flatten(2)[None] for core in cores)
            self._kept[module] = keys, values
        keys, values = (part.expand(len(query), -1, -1, -1) for part in self._kept[module])
        return attend(query, keys, values)


class _Cut:
    """Takes the margin off feature maps of any resolution, and off the same in one row of tokens."""

    def __init__(self, size: tuple[int, int], margin: tuple[int, int]) -> None:
        self._size, self._margin = size, margin

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """The core of maps whose places are dimensions `place` and the next, or of tokens in dimension `place`."""
        height, width = self._size
        if place == 2 and x.ndim == 4:
            rows, columns = x.shape[place : place + 2]
        else:
            rows = round(math.sqrt(x.shape[place] * height / width))
            columns = x.shape[place] // rows
            x = x.unflatten(place, (rows, columns))
        top, left = rows * self._margin[0] // height, columns * self._margin[1] // width
        return x.narrow(place, top, rows - 2 * top).narrow(place + 1, left, columns - 2 * left)
