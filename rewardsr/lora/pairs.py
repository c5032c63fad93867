"""LoRAs apart from any network: what each module is changed by, and how that comes to one rank and one scale."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewardsr.errors import UserError, shown

SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
LARGEST_RANK = 4096  # far above any LoRA in use; a file may say anything, and zeros up to its rank are made
LARGEST_ALPHA = 1e6

Place = tuple[str, str]  # component and module
Shape = tuple[int, tuple[int, ...]]  # of a module: its output channels, and the shape of one output's weights


class Pair(NamedTuple):
    """What a module is changed by: scale * B A, of A (r, in) or (r, in, kh, kw) and B (out, r) or (out, r, 1, 1)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA apart from any network.

    Attributes:
        tensors: by their names in our file (`unet.<module>.lora_A.weight`): A is (r, in) or a kernel (r, in, kh, kw),
            B is (out, r) or (out, r, 1, 1); float32.
        rank: r, of all modules.
        alpha: B A is scaled by alpha / rank.
        targets: module names (suffixes) by component that it sits on; None: those of the adapter.
        options: of the adapter that it was trained with, as far as it depends on them.
        in_full: whether weights that were trained in full belong to it, in a file beside its own.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    targets: Mapping[str, Sequence[str]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    in_full: bool = False

    def pairs(self, weight: float = 1.0) -> dict[Place, Pair]:
        """What each module is changed by, times a weight."""
        scale, (end, other) = weight * self.alpha / self.rank, SUFFIXES.values()
        found = {}
        for key, a in self.tensors.items():
            if key.endswith(end):
                stem = key.removesuffix(end)
                component, _, module = stem.partition(".")
                found[component, module] = Pair(a, self.tensors[stem + other], scale)
        return found


def by_component(places: Iterable[Place]) -> dict[str, list[str]]:
    """Modules by component, sorted: the targets of a LoRA on these places alone."""
    found: dict[str, list[str]] = {}
    for component, module in sorted(places):
        found.setdefault(component, []).append(module)
    return found


def side_by_side(pairs: Sequence[Pair]) -> Pair:
    """One pair that acts as the sum of several on one module.

    Raises:
        UserError: they are of different sizes.
    """
    if len(pairs) == 1:
        return pairs[0]
    sizes = {(*pair.a.shape[1:], len(pair.b)) for pair in pairs}
    if len(sizes) > 1:
        raise UserError(f"LoRAs on one module have the different sizes {', '.join(map(str, sizes))}")
    return Pair(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b * pair.scale for pair in pairs], 1), 1.0)


def even(pairs: Mapping[Place, Pair], shapes: Mapping[Place, Shape] | None = None) -> Lora:
    """One LoRA of pairs that may differ in rank and scale: what B A does stays.

    Lower ranks are filled up with zeros. A positive scale that all have in common is kept as alpha, others go into B.

    Args:
        pairs: by place; not empty.
        shapes: of more places, which get zeros.

    Raises:
        UserError: a rank above `LARGEST_RANK`, which all modules would have then.
    """
    rank = rank_of(max(len(pair.a) for pair in pairs.values()))
    kinds = {(len(pair.a), pair.scale) for pair in pairs.values()}
    common = kinds.pop()[1] if len(kinds) == 1 else 1.0
    common = common if common > 0 else 1.0  # other programs know no alpha of 0 or below
    tensors: dict[str, Tensor] = {}
    for place in [*pairs, *(place for place in shapes or () if place not in pairs)]:
        if place in pairs:
            a, b, scale = pairs[place]
            if len(a) < rank:
                a = torch.cat([a, a.new_zeros(rank - len(a), *a.shape[1:])])
                b = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1], *b.shape[2:])], 1)
            b = b if scale == common else b * (scale / common)
        else:
            assert shapes is not None
            out, kernel = shapes[place]
            a, b = torch.zeros(rank, *kernel), torch.zeros(out, rank, *[1] * (len(kernel) - 1))
        stem = ".".join(place)
        tensors |= {f"{stem}{SUFFIXES['A']}": a, f"{stem}{SUFFIXES['B']}": b}
    return Lora(tensors, rank, float(f"{common * rank:.12g}"))  # 1 / 49 times 49 is 1


def floats(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32, contiguous.

    Raises:
        UserError: it is not of floating point, or holds values that are not finite.
    """
    if not tensor.is_floating_point():
        raise UserError(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, expected floating point")
    tensor = tensor.to(torch.float32, memory_format=torch.contiguous_format)
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds values that are not finite")
    return tensor


def rank_of(value: object) -> int:
    """A rank as a header or setting states it.

    Raises:
        UserError: no whole number from 1 to `LARGEST_RANK`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 1:
        raise UserError(f"rank is {shown(value)}, expected a whole number from 1 to {LARGEST_RANK}")
    if value > LARGEST_RANK:
        raise UserError(f"rank is {shown(value)}, expected at most {LARGEST_RANK}")
    return int(value)


def alpha_of(value: object) -> float:
    """An alpha as a header, a setting or a tensor of one element states it.

    Raises:
        UserError: no positive number up to `LARGEST_ALPHA`.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UserError(f"alpha is a tensor {tuple(value.shape)}, expected positive numbers, one each")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_ALPHA:
        raise UserError(f"alpha is {shown(value)}, expected positive numbers up to {LARGEST_ALPHA:g}")
    return float(value)
