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


@contextlib.contextmanager
def computing(device: torch.device, precision: Precision = "fp32") -> Iterator[None]:
    """Inside, products and convolutions on `device` have this precision, and cuDNN chooses nothing by chance.

    It does not reach the gradients: those are computed by what is set where `backward` is called.

    Args:
        device: of the tensors.
        precision: "tf32" is float32 where there is no CUDA; "bf16" is autocast.
    """
    products, tf32 = torch.backends.cuda.matmul, device.type == "cuda" and precision != "fp32"
    before = products.allow_tf32
    products.allow_tf32 = tf32
    try:
        with (
            torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True, allow_tf32=tf32),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        products.allow_tf32 = before


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
