"""Telling base models apart: names, shapes and a few weights.

A fingerprint is equal across fp16, bf16 and fp32 copies, mirrors and file formats of the same weights, and differs
for another fine-tune of the same architecture. Rounding can move a weight by one bf16 step, so two fingerprints are
compared with `same_base`, not as text.
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

TENSORS, VALUES = 16, 4
TOLERANCE = 2**-7  # two bf16 roundings of one number differ by at most one step, 2^-8 to 2^-7 of it
FLOOR = 1e-5  # below this, fp16 itself has no relative precision left


def fingerprint(networks: Mapping[str, nn.Module]) -> str:
    """`sha:v,v,...`: hash of all parameter names and shapes, and 64 weights spread over the networks.

    Args:
        networks: component name ("unet") to module, before any LoRA is attached.
    """
    tensors: dict[str, Tensor] = {
        f"{component}.{name}": value
        for component, network in networks.items()
        for name, value in network.state_dict().items()
    }
    shapes = ";".join(f"{name}:{tuple(tensors[name].shape)}" for name in sorted(tensors))
    structure = hashlib.sha256(shapes.encode()).hexdigest()[:16]
    matrices = [name for name in sorted(tensors) if tensors[name].ndim >= 2]
    chosen = matrices[:: max(1, len(matrices) // TENSORS)][:TENSORS]
    values: list[float] = []
    for name in chosen:
        flat = tensors[name].detach().flatten()
        values += [float(value) for value in flat[:: max(1, len(flat) // VALUES)][:VALUES].bfloat16().float().cpu()]
    return f"{structure}:{','.join(f'{value:.5g}' for value in values)}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints belong to the same weights."""
    structure, _, values = one.partition(":")
    other_structure, _, other_values = other.partition(":")
    if structure != other_structure:
        return False
    pairs = zip(values.split(","), other_values.split(","), strict=True)
    numbers = [(float(a), float(b)) for a, b in pairs if a or b]
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + FLOOR for a, b in numbers)
