"""In which precision rewards compute: one context around each of them, whatever the caller has set.

Formulas take differences of nearly equal numbers (a variance is E[x^2] - E[x]^2) and are computed in float32; networks
may do with less. TF32 (CUDA, from Ampere on) keeps the range of float32, and ten bits of the mantissa of what is
multiplied. Left alone, torch convolves in it, and multiplies matrices in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from rewardsr.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
Wanted = Literal["auto", Precision]
NETWORK = 10_000  # weights; fewer are the fixed filters of a formula


# What decides on TF32, with the values for yes and no. From torch 2.9 on there are names for each operation, and the
# older ones raise where somebody has used those.
_CUDNN, _PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul
_SWITCHES, _VALUES = (
    ([(owner, "fp32_precision") for owner in (_PRODUCTS, _CUDNN.conv, _CUDNN.rnn)], ("tf32", "ieee"))
    if hasattr(_CUDNN, "conv")
    else ([(owner, "allow_tf32") for owner in (_PRODUCTS, _CUDNN)], (True, False))
)


@contextlib.contextmanager
def computing(device: torch.device, precision: Precision = "fp32") -> Iterator[None]:
    """Inside, products and convolutions on `device` have this precision, and cuDNN chooses nothing by chance.

    It does not reach the gradients: those are computed by what is set where `backward` is called.

    Args:
        device: of the tensors.
        precision: "tf32" is float32 where there is no CUDA; "bf16" is autocast.
    """
    tf32 = _VALUES[0 if device.type == "cuda" and precision != "fp32" else 1]
    wanted = [(_CUDNN, "deterministic", True), (_CUDNN, "benchmark", False), *((*place, tf32) for place in _SWITCHES)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
    try:
        for place in wanted:
            setattr(*place)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for place in before:
            setattr(*place)


def chosen(owner: str, network: nn.Module, wanted: Wanted) -> Precision:
    """What "auto" stands for: TF32 for what has learnt weights, float32 for formulas.

    Args:
        owner: for messages ("metric 'ssim'").
        network: with all that it may have learnt.
        wanted: by the user.

    Raises:
        UserError: another precision than float32 for a formula.
    """
    if sum(weight.numel() for weight in network.parameters()) >= NETWORK:
        return "tf32" if wanted == "auto" else wanted
    if wanted not in ("auto", "fp32"):
        raise UserError(f"{owner} is a formula, which is computed in fp32: drop the option 'precision'")
    return "fp32"
