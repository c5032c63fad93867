"""In which precision rewards compute: one context around each of them, whatever the caller has set.

Formulas take differences of nearly equal numbers (a variance is E[x^2] - E[x]^2) and are computed in float32; networks
may do with less. TF32 (CUDA, from Ampere on) keeps the range of float32, and ten bits of the mantissa of what is
multiplied. Left alone, torch convolves in it, and multiplies matrices in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

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
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with (
            _tf32(device.type == "cuda" and precision != "fp32"),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # somebody has set the switches of torch 2.9, beside which the older ones cannot be read
        switches = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        values = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if on else "ieee"
            yield
        finally:
            for switch, value in zip(switches, values, strict=True):
                switch.fp32_precision = value
        return
    try:
        torch.set_float32_matmul_precision("high" if on else "highest")
        cudnn.allow_tf32 = on
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


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
